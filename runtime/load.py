"""From a checkpoint folder to a running module: build it on meta, swap in int4 layers, stream the tensors in."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.checkpoint import Checkpoint
from formats.errors import CheckpointError, UsageError
from formats.hub import download
from formats.layout import Scheme
from formats.selection import WEIGHT
from formats.tensors import TORCH_DTYPES, tensor_from
from runtime.linear import Int4Linear

ROTARY_TABLE = r"rotary_emb\.inv_freq$"  # old checkpoints hold it; models compute it


def load(
    folder_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    revision: str | None = None,
) -> nn.Module:
    """Build the model of an int4 checkpoint through transformers, with `Int4Linear` layers, ready to run.

    `device` defaults to the GPU if there is one; `dtype` to that of the checkpoint, and never touches codes or scales;
    `verify` checks the SHA-256 of every shard. Raises `CheckpointError` for a checkpoint that is damaged or does not
    fit its model exactly, `UsageError` without transformers, `HubError` and `TemporaryError` from the Hub.
    """
    folder = resolve(folder_or_hub_id, revision)
    checkpoint = Checkpoint(folder)
    model: nn.Module = build(folder, dtype)
    ignore = [ROTARY_TABLE, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    fill(model, checkpoint, device=default_device(device), dtype=dtype, verify=verify, ignore=ignore)
    return model


def load_into(
    module: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """Fill any `module`, on meta or not, from an int4 checkpoint folder; its quantised linears become `Int4Linear`.

    Needs torch (and Triton for speed) alone. Parameters on meta go to `device`. Raises `CheckpointError` unless module
    and checkpoint name exactly the same tensors; after an error the module is not fit for use.
    """
    fill(module, Checkpoint(Path(folder)), device=default_device(device), dtype=dtype, verify=verify)
    return module


def resolve(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: itself, or its snapshot from the Hub."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    return download(str(folder_or_hub_id), revision)


def default_device(device: torch.device | str | None) -> torch.device:
    """`device`, or the GPU if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def build(folder: Path, dtype: torch.dtype | None) -> Any:
    """The transformers model of `folder`, in evaluation mode, its parameters on meta; no code of the folder is run."""
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "runtime.load builds models through transformers, which is not installed; "
            "pip install 'int4-convert[hf]', or fill a module of your own with runtime.load_into"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: transformers cannot read its config.json ({_first_line(error)})") from None
    name = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    architecture: Any = getattr(transformers, name, None)
    known = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    if not known:
        raise CheckpointError(f"{folder}: config.json names the architecture {name!r}, which this transformers lacks")
    with parameters_on_meta():
        model = architecture._from_config(config, dtype=dtype or getattr(config, "dtype", None))
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, parameters land on meta as modules register them, while buffers are computed for real.

    So tables such as rotary frequencies, which no checkpoint holds, are right without knowing any of them (the method
    is that of accelerate's init_empty_weights).
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    verify: bool,
    ignore: Iterable[str] = (),
) -> None:
    """Swap and fill `module` in place; tensors that match a regular expression of `ignore` are read but not used."""
    scheme, where = checkpoint.manifest.recipe.scheme, checkpoint.folder
    ignored = [re.compile(pattern) for pattern in ignore]
    used: set[str] = set()
    for row in checkpoint.manifest.tensors:
        if any(pattern.search(row.name) for pattern in ignored):
            continue
        if row.quantized:
            _swap(module, row.name.removesuffix(WEIGHT), row.shape, TORCH_DTYPES[row.dtype], scheme, where)
        used |= row.stored(scheme).keys()
    tied = _tied_names(module)
    _compare(used, tied, where)
    _refuse_meta_tables(module, tied, where)
    for name, spec, data in checkpoint.stream(verify):
        if name in used:
            # A name that the checkpoint gives its own tensor is not tied, whatever the model says.
            names = tied[name] - (used - {name})
            _assign(module, names, tensor_from(data, spec), device, dtype, where)
    module.to(device)


def _swap(
    module: nn.Module, path: str, shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme, where: Path
) -> None:
    try:
        old = module.get_submodule(path)
    except AttributeError:
        raise CheckpointError(
            f"{where}: holds {path!r}, which {type(module).__name__} lacks; is it the same model?"
        ) from None
    if isinstance(old, Int4Linear) and old.scheme == scheme and (old.out_features, old.in_features) == shape:
        return
    if not isinstance(old, nn.Linear) or tuple(old.weight.shape) != shape:
        found = f"{type(old).__name__} {list(getattr(getattr(old, 'weight', None), 'shape', []))}"
        raise CheckpointError(f"{where}: {path!r} is an int4 matrix {list(shape)}, the model has a {found} there")
    new = Int4Linear(shape[1], shape[0], scheme, bias=False, dtype=dtype, device="meta")
    new.bias = old.bias
    module.set_submodule(path, new.train(old.training))


def _tied_names(module: nn.Module) -> dict[str, set[str]]:
    """Each name of the state dict → all names of that same tensor."""
    stored = module.state_dict(keep_vars=True)
    same: dict[int, set[str]] = {}
    for name, tensor in stored.items():
        same.setdefault(id(tensor), set()).add(name)
    return {name: same[id(tensor)] for name, tensor in stored.items()}


def _compare(used: set[str], tied: dict[str, set[str]], where: Path) -> None:
    missing = sorted(name for name, names in tied.items() if not names & used)
    unexpected = sorted(used - tied.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: does not fit the model: {len(missing)} tensors missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)}); is it the same architecture and version?"
        )


def _refuse_meta_tables(module: nn.Module, stored: Iterable[str], where: Path) -> None:
    left = sorted({name for name, buffer in module.named_buffers() if buffer.is_meta} - set(stored))
    if left:
        raise CheckpointError(f"{where}: leaves {_some(left)} on the meta device; build these buffers before loading")


def _assign(
    module: nn.Module, names: set[str], tensor: Tensor, device: torch.device, dtype: torch.dtype | None, where: Path
) -> None:
    """Put `tensor` in the place of all of `names`, in `dtype`, or else the type that it replaces."""
    value: Tensor | None = None
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        place: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        old = place[leaf]
        if old is None or old.shape != tensor.shape:
            found = None if old is None else list(old.shape)
            raise CheckpointError(f"{where}: {name!r} is {list(tensor.shape)}, the model expects {found}")
        if value is None:
            fixed = isinstance(owner, Int4Linear) and place is owner._buffers
            kind = tensor.dtype if fixed or not tensor.is_floating_point() else dtype or old.dtype
            value = tensor.to(device, kind)
            if place is owner._parameters:
                value = nn.Parameter(value, requires_grad=False)
        place[leaf] = value


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
