"""The plain road from a checkpoint to a module of one's own: swap in int4 layers, stream the tensors in."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.checkpoint import Checkpoint
from formats.devices import parse_device, room_for
from formats.errors import CheckpointError, some
from formats.layout import scale_dtype_for
from formats.manifest import TensorRecord
from formats.tensors import TORCH_DTYPES, spec_of
from runtime.linear import SUFFIXES, Int4Linear
from runtime.siblings import join as join_siblings
from runtime.swap import is_part, shape_in, swap, type_in


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
    checkpoint, place = Checkpoint(Path(folder)), parse_device(device)
    scheme, where, rows = checkpoint.manifest.recipe.scheme, checkpoint.folder, checkpoint.manifest.tensors
    held = module.state_dict(keep_vars=True)
    tied = _tied_names(held)
    for row in rows:
        if row.quantized:
            _check_place(module, row, where)
            _untie(tied, row.name)
            for name in row.stored(scheme):
                tied[name] = {name}
    used = {name for row in rows for name in row.stored(scheme)}
    refuse_misfit(where, [name for name, names in tied.items() if not names & used], used - tied.keys())
    _refuse_left_on_meta(module, held, where)
    _check_kept(held, rows, used, tied, where)
    for row in rows:
        if row.quantized:
            swap(module, row.name, row.matrix.shape, scheme, transposed=row.transposed,
                 dtype=dtype or type_in(module, row.name), scale_dtype=scale_dtype_for(row.dtype),
                 activations=activations)  # fmt: skip
    with room_for(f"{where}, {checkpoint.manifest.sizes.stored_bytes / 1e6:,.0f} MB"):
        for name, _, tensor in checkpoint.stream(verify, place):
            # A name that the checkpoint gives its own tensor is not tied, whatever the model says.
            fixed = is_part(name, used) or not tensor.is_floating_point()
            _assign(module, tied[name] - (used - {name}), tensor, place, tensor.dtype if fixed else dtype)
        module.to(place)
        for layer in module.modules():
            if isinstance(layer, Int4Linear):
                layer.arrange()
        if join is not False:
            join_siblings(module, gpu_only=join is None)
    return module


def _check_place(module: nn.Module, row: TensorRecord, where: Path) -> None:
    """The module must have a linear layer or experts of the row's shape in its place, int4 or not."""
    path, _, leaf = row.name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        model = type(module).__name__
        raise CheckpointError(f"{where}: holds {path!r}, which {model} lacks; is it the same model?") from None
    found = shape_in(owner, leaf, transposed=row.transposed)
    if found != row.matrix.shape:
        kind = f"{type(owner).__name__} {list(found or ())}"
        raise CheckpointError(f"{where}: {path!r} is int4 {list(row.matrix.shape)}, the model has a {kind} there")


def _check_kept(
    held: Mapping[str, Tensor], rows: Sequence[TensorRecord], used: set[str], tied: dict[str, set[str]], where: Path
) -> None:
    """Every kept tensor must have the shape of what it replaces, and be floats where that is."""
    for row in rows:
        for name in () if row.quantized else sorted(tied[row.name] - (used - {row.name})):
            old, floats = held[name], TORCH_DTYPES[row.dtype].is_floating_point
            if old.shape != row.shape or old.is_floating_point() != floats:
                raise CheckpointError(f"{where}: {name!r} is {row.spec}, the model expects {spec_of(old)}")


def _tied_names(held: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Each name of the state dict `held` → all names of that same tensor."""
    same: dict[int, set[str]] = {}
    for name, tensor in held.items():
        same.setdefault(id(tensor), set()).add(name)
    return {name: same[id(tensor)] for name, tensor in held.items()}


def _untie(tied: dict[str, set[str]], weight: str) -> None:
    """Take `weight`, or the int4 tensors that already stand for it, out of `tied`."""
    for name in (weight, *(weight + suffix for suffix in SUFFIXES)):
        tied.pop(name, set()).discard(name)


def refuse_misfit(where: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise `CheckpointError` unless model and checkpoint name exactly the same tensors."""
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: does not fit the model: {len(missing)} tensors missing ({some(sorted(missing)) or 'none'}), "
            f"{len(unexpected)} unexpected ({some(sorted(unexpected)) or 'none'}); is it the same architecture and "
            "version?"
        )


def _refuse_left_on_meta(module: nn.Module, held: Mapping[str, Tensor], where: Path) -> None:
    """What has no memory must be in the state dict `held`, which a checkpoint fills; buffers need not be."""
    tensors = [*module.named_buffers(), *module.named_parameters()]
    if left := sorted({name for name, tensor in tensors if tensor.is_meta} - held.keys()):
        raise CheckpointError(f"{where}: leaves {some(left)} on the meta device; build them before loading")


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
            value = tensor.to(device, dtype or place[leaf].dtype)
            if place is owner._parameters:
                value = nn.Parameter(value, requires_grad=False)
        place[leaf] = value
