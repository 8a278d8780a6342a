"""What transformers knows of the model of a checkpoint; no code of its folder is run."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.errors import CheckpointError, UsageError
from formats.progress import draws_bars

BUILDING = threading.RLock()  # one model at a time: torch and transformers are changed meanwhile


def architecture_of(folder: Path, otherwise: str) -> tuple[Any, Any]:
    """The class of transformers for the model in `folder`, and its configuration; no code of the folder is run.

    Raises `UsageError` without transformers, `CheckpointError` for a configuration that it does not understand, with
    what to do `otherwise`.
    """
    transformers = import_transformers(folder, otherwise)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return _architecture(config), config
    except Exception as error:  # a configuration is data from outside: whatever transformers makes of it
        raise cannot_build(folder, error, otherwise) from None


def read_generation_config(model: Any, folder: Path) -> None:
    """Give `model` the defaults of generation that `folder` holds."""
    import transformers

    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def cannot_build(folder: Path, error: Exception, otherwise: str) -> CheckpointError:
    """What to raise where transformers fails on the data of `folder`."""
    return CheckpointError(f"{folder}: transformers cannot build the model ({first_line(error)}); {otherwise}")


def import_transformers(folder: Path, otherwise: str | None = None) -> Any:
    """The package; raises `UsageError`, with what to do `otherwise` with `folder`, where it cannot be imported."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"{folder}: its model and tokenizer come through transformers, which cannot be imported "
            f"({first_line(error)}); pip install 'int4-convert[hf]'" + (f", or {otherwise}" if otherwise else "")
        ) from None
    return transformers


@contextmanager
def transformers_bars(quiet: bool = False) -> Iterator[None]:
    """Hide the progress bars of transformers meanwhile, `quiet` or where nobody watches them."""
    from transformers.utils import logging

    if draws_bars(quiet) or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def with_plain_attention(make: Callable[..., Any]) -> Any:
    """`make` a model with torch's own attention: a configuration could name a kernel to be fetched from the Hub."""
    try:
        return make(attn_implementation="sdpa")
    except ValueError:  # the model has none of that kind
        return make(attn_implementation="eager")


def _architecture(config: Any) -> Any:
    """The class of transformers that the configuration names, or its causal language model."""
    import transformers

    names = getattr(config, "architectures", None)
    if not names:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    architecture = getattr(transformers, str(names[0]), None) if isinstance(names, list) else None
    known = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    if not known:
        raise ValueError(f"this transformers has no architecture {names!r}")
    return architecture


def first_line(error: Exception) -> str:
    """The type and the first line of the text of `error`."""
    return " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:300]
