"""From a checkpoint folder to a running module: build it on meta, swap in int4 layers, stream the tensors in."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.checkpoint import Checkpoint
from formats.devices import parse_device
from formats.errors import CheckpointError, some
from formats.hub import download
from formats.layout import PACKED, SCALE, ZERO_POINT, Scheme
from formats.manifest import Manifest, TensorRecord
from formats.selection import WEIGHT
from formats.skeleton import build
from formats.tensors import TORCH_DTYPES, spec_of
from runtime.linear import Int4Linear
from runtime.siblings import join as join_siblings

ROTARY_TABLE = r"rotary_emb\.inv_freq$"  # old checkpoints hold it; models compute it


def load(
    folder_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    revision: str | None = None,
    join: bool | None = None,
    activations: str | None = None,
) -> nn.Module:
    """Build the model of an int4 checkpoint through transformers, with `Int4Linear` layers, ready to run.

    `device` defaults to the GPU if there is one; `dtype` to that of the checkpoint, and never touches codes or scales;
    `verify` checks the SHA-256 of every shard; `join` lets layers that share their input share a product
    (`siblings.join`): by default on a GPU, where it saves launches; a CPU is slower with larger matrices to unpack.
    `activations="fp8"` is faster with many tokens and changes the numbers (`Int4Linear`).

    Raises `CheckpointError` for a checkpoint that is damaged or does not fit its model exactly, `UsageError` without
    transformers, `HubError` and `TemporaryError` from the Hub.
    """
    folder = resolve(folder_or_hub_id, revision)
    checkpoint = Checkpoint(folder)
    model: nn.Module = build(folder, dtype, stored=_stored_dtype(checkpoint.manifest))
    ignore = [ROTARY_TABLE, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    fill(model, checkpoint, device=parse_device(device), dtype=dtype, verify=verify, join=join,
         activations=activations, ignore=ignore)  # fmt: skip
    return model


def load_into(
    module: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    join: bool | None = None,
    activations: str | None = None,
) -> nn.Module:
    """Fill any `module`, on meta or not, from an int4 checkpoint folder; its quantised linears become `Int4Linear`.

    Needs torch (and Triton for speed) alone. Parameters on meta go to `device`; `join` and `activations` are those of
    `load`. Raises `CheckpointError` unless module and checkpoint name exactly the same tensors, with nothing changed;
    after an error in the bytes of the checkpoint the module is not fit for use.
    """
    fill(module, Checkpoint(Path(folder)), device=parse_device(device), dtype=dtype, verify=verify, join=join,
         activations=activations)  # fmt: skip
    return module


def resolve(folder_or_hub_id: str | Path, revision: str | None = None, *, ignore: Sequence[str] = ()) -> Path:
    """The local folder of a checkpoint: itself, or its snapshot from the Hub without files that match `ignore`."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    return download(str(folder_or_hub_id), revision, ignore=ignore)


def _stored_dtype(manifest: Manifest) -> torch.dtype:
    """The type of the first floating-point tensor of the source."""
    kinds = (TORCH_DTYPES[row.dtype] for row in manifest.tensors)
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    verify: bool,
    join: bool | None,
    activations: str | None,
    ignore: Iterable[str] = (),
) -> None:
    """Fill `module` in place; what matches a regular expression of `ignore`, and the module lacks, is not used.

    Nothing is changed before names, types and shapes are known to fit.
    """
    scheme, where = checkpoint.manifest.recipe.scheme, checkpoint.folder
    held = module.state_dict(keep_vars=True)
    rows = _used_rows(held, checkpoint.manifest, ignore)
    tied = _tied_names(held)
    for row in rows:
        if row.quantized:
            _check_linear(module, row, scheme, where)
            _untie(tied, row.name)
            for name in row.stored(scheme):
                tied[name] = {name}
    used = {name for row in rows for name in row.stored(scheme)}
    _compare(used, tied, where)
    _refuse_meta_tables(module, tied, where)
    _check_kept(held, rows, used, tied, where)
    layers = [_swap(module, row, scheme, activations) for row in rows if row.quantized]
    for name, _, tensor in checkpoint.stream(verify, device):
        if name in used:
            # A name that the checkpoint gives its own tensor is not tied, whatever the model says.
            names = tied[name] - (used - {name})
            _assign(module, names, tensor, device, dtype)
    module.to(device)
    for layer in layers:
        layer.arrange()
    if join is not False:
        join_siblings(module, gpu_only=join is None)


def _used_rows(held: Mapping[str, Tensor], manifest: Manifest, ignore: Iterable[str]) -> list[TensorRecord]:
    ignored = [re.compile(pattern) for pattern in ignore]
    return [row for row in manifest.tensors if row.name in held or not any(p.search(row.name) for p in ignored)]


def _check_linear(module: nn.Module, row: TensorRecord, scheme: Scheme, where: Path) -> None:
    """The module must have a linear layer of the row's shape in its place, or an int4 one from an earlier load."""
    path = row.name.removesuffix(WEIGHT)
    try:
        found = module.get_submodule(path)
    except AttributeError:
        model = type(module).__name__
        raise CheckpointError(f"{where}: holds {path!r}, which {model} lacks; is it the same model?") from None
    sizes = [getattr(found, name, 0) for name in ("out_features", "in_features")]
    if not isinstance(found, nn.Linear | Int4Linear) or sizes != list(row.shape):
        kind = f"{type(found).__name__} {sizes}"
        raise CheckpointError(f"{where}: {path!r} is an int4 matrix {list(row.shape)}, the model has a {kind} there")


def _check_kept(
    held: Mapping[str, Tensor], rows: list[TensorRecord], used: set[str], tied: dict[str, set[str]], where: Path
) -> None:
    """Every kept tensor must have the shape of what it replaces, and be floats where that is."""
    for row in rows:
        for name in () if row.quantized else sorted(tied[row.name] - (used - {row.name})):
            old, floats = held[name], TORCH_DTYPES[row.dtype].is_floating_point
            if old.shape != row.shape or old.is_floating_point() != floats:
                raise CheckpointError(f"{where}: {name!r} is {row.spec}, the model expects {spec_of(old)}")


def _swap(module: nn.Module, row: TensorRecord, scheme: Scheme, activations: str | None) -> Int4Linear:
    path = row.name.removesuffix(WEIGHT)
    old: Any = module.get_submodule(path)
    rows, columns = row.shape
    dtype = TORCH_DTYPES[row.dtype]
    new = Int4Linear(columns, rows, scheme, bias=False, dtype=dtype, device="meta", activations=activations)
    new.bias = old.bias
    module.set_submodule(path, new.train(old.training))
    return new


def _tied_names(held: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Each name of the state dict `held` → all names of that same tensor."""
    same: dict[int, set[str]] = {}
    for name, tensor in held.items():
        same.setdefault(id(tensor), set()).add(name)
    return {name: same[id(tensor)] for name, tensor in held.items()}


def _untie(tied: dict[str, set[str]], weight: str) -> None:
    """Take `weight`, or the int4 tensors that already stand for it, out of `tied`."""
    for name in (weight, weight + PACKED, weight + SCALE, weight + ZERO_POINT):
        tied.pop(name, set()).discard(name)


def _compare(used: set[str], tied: dict[str, set[str]], where: Path) -> None:
    missing = sorted(name for name, names in tied.items() if not names & used)
    unexpected = sorted(used - tied.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: does not fit the model: {len(missing)} tensors missing ({some(missing) or 'none'}), "
            f"{len(unexpected)} unexpected ({some(unexpected) or 'none'}); is it the same architecture and version?"
        )


def _refuse_meta_tables(module: nn.Module, stored: Iterable[str], where: Path) -> None:
    left = sorted({name for name, buffer in module.named_buffers() if buffer.is_meta} - set(stored))
    if left:
        raise CheckpointError(f"{where}: leaves {some(left)} on the meta device; build these buffers before loading")


def _assign(
    module: nn.Module, names: set[str], tensor: Tensor, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Put `tensor` in the place of all of `names`, in `dtype`, or else the type that it replaces."""
    value: Tensor | None = None
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        place: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        if value is None:
            fixed = isinstance(owner, Int4Linear) and place is owner._buffers
            kind = tensor.dtype if fixed or not tensor.is_floating_point() else dtype or place[leaf].dtype
            value = tensor.to(device, kind)
            if place is owner._parameters:
                value = nn.Parameter(value, requires_grad=False)
        place[leaf] = value
