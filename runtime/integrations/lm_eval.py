"""Tasks of EleutherAI's lm-evaluation-harness on a model that is loaded already.

The harness is given the model itself (`HFLM(pretrained=model)`), because what it would load by name it loads in its own
way: the loader of quantised checkpoints broke more than once (issues 1978, 2018, 3026 and 3039 of its repository).
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from formats.architecture import first_line
from formats.errors import TemporaryError, UsageError, some
from formats.progress import bar_class, draws_bars


@dataclass(frozen=True)
class Score:
    """One figure of a task: `metric` with the filter that it was taken behind, if any; None for an unknown error."""

    task: str
    metric: str
    value: float
    stderr: float | None


class Harness:
    """The tasks `names`, which may be globs, with their options.

    `limit` is the number of examples of each; `folder` holds tasks of one's own, as YAML files. Raises `UsageError`
    without the harness, and for a name that is no task.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        folder: Path | None = None,
        quiet: bool = False,
    ) -> None:
        try:
            import lm_eval.models.huggingface  # noqa: F401 - not all of its own needs come with it
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UsageError(
                f"--tasks: needs lm-evaluation-harness, which cannot be imported ({first_line(error)}); "
                "pip install 'int4-convert[lm-eval]'"
            ) from None
        self.manager = TaskManager(include_path=None if folder is None else str(folder))
        self.names = self.manager.match_tasks(list(names))
        unknown = [name for name in names if not self.manager.match_tasks([name])]
        if unknown or not names:
            raise UsageError(
                f"--tasks: {some(unknown) or 'none'} is no task of lm-evaluation-harness {version('lm_eval')}; "
                "`lm-eval ls tasks` lists them, --include-path adds a folder of your own"
            )
        self.num_fewshot = num_fewshot
        self.limit = limit
        self.quiet = quiet

    @property
    def options(self) -> dict[str, Any]:
        """What the figures depend on beside model and tasks."""
        return {"lm_eval": version("lm_eval"), "num_fewshot": self.num_fewshot, "limit": self.limit}

    def run(self, model: nn.Module, tokenizer: Any, batch_size: int = 1) -> list[Score]:
        """Every figure of every task.

        Raises `TemporaryError` where the data of a task cannot be had, `UsageError` where the harness refuses it.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            with _told_as_we_do(self.quiet):
                with _plain(model):
                    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
                found = lm_eval.simple_evaluate(
                    wrapped, tasks=self.names, task_manager=self.manager, num_fewshot=self.num_fewshot,
                    limit=self.limit, log_samples=False,
                )  # fmt: skip
        except OSError as error:
            raise TemporaryError(
                f"--tasks: their data cannot be had ({first_line(error)}); connect, or look at the data files they name"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"--tasks: lm-evaluation-harness cannot run them ({first_line(error)})") from None
        return list(scores(found["results"]))


def scores(results: dict[str, dict[str, Any]]) -> Iterator[Score]:
    """The figures in what the harness returns: keys such as `acc,none` and `acc_stderr,none` for each task."""
    for task, figures in results.items():
        for key, value in figures.items():
            metric, comma, behind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{behind}")
            name = metric if behind == "none" else f"{metric}, {behind}"
            yield Score(task, name, float(value), float(error) if isinstance(error, int | float) else None)


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Inside, the configuration of `model` does not say that it is quantised, which the harness would look up."""
    fields = vars(model.config)
    quantization = fields.pop("quantization_config", None)
    try:
        yield
    finally:
        if quantization is not None:
            fields["quantization_config"] = quantization


@contextmanager
def _told_as_we_do(quiet: bool) -> Iterator[None]:
    """Inside, the harness shows its progress as our commands do, and warns of nothing that its user cannot change."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    if not draws_bars(quiet):
        datasets.disable_progress_bars()
    drawing = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    before = [module.tqdm for module in drawing]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    for module in drawing:
        module.tqdm = bar_class(quiet)
    try:
        yield
    finally:
        for module, tqdm in zip(drawing, before, strict=True):
            module.tqdm = tqdm
        logger.setLevel(level)
