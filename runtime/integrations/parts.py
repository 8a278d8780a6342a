"""Int4 weights while transformers loads them, and may share them out among processes."""

from collections.abc import Mapping

from torch import Tensor, nn

from formats.codec import check_scale
from formats.errors import CheckpointError
from formats.layout import CODES_PER_WORD, PACKED, ROW_WISE, SCALE, Scheme, ceil_div
from formats.tensors import spec_of
from runtime.linear import SUFFIXES, Int4Linear


def as_parameters(layer: Int4Linear) -> None:
    """Make the weight of `layer` parameters as long as it loads: transformers shards nothing else."""
    for name in [f"weight{suffix}" for suffix in SUFFIXES]:
        tensor = layer._buffers.pop(name)
        layer.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


def as_buffers(path: str, layer: Int4Linear) -> None:
    """Make the weight of `layer` buffers again: all of it, or with tensor parallelism a part."""
    held = {suffix: layer._parameters.pop(f"weight{suffix}") for suffix in SUFFIXES}
    layer.rows, layer.columns = check_part(f"{path}.weight", held, layer.columns, layer.scheme)
    for suffix, tensor in held.items():
        layer.register_buffer(f"weight{suffix}", None if tensor is None else _local(tensor).detach())


def check_part(name: str, held: Mapping[str, Tensor | None], columns: int, scheme: Scheme) -> tuple[int, int]:
    """The rows and columns that this process holds of the int4 tensor `name`, which has so many `columns` in all.

    Raises `CheckpointError` for scales that cannot be, or a part that cuts a group in two.
    """
    parts = {suffix: _local(tensor) for suffix, tensor in held.items() if tensor is not None}
    check_scale(parts[SCALE])
    *stack, rows, words = parts[PACKED].shape
    part = columns if words == ceil_div(columns, CODES_PER_WORD) else words * CODES_PER_WORD
    whole_groups = part == columns or (scheme.group_size != ROW_WISE and part % scheme.group_size == 0)
    expected = scheme.stored("", (*stack, rows, part), spec_of(parts[SCALE]).dtype)
    if not whole_groups or any(tensor.shape != expected[suffix].shape for suffix, tensor in parts.items()):
        raise CheckpointError(
            f"{name!r}: has {columns} columns in groups of {scheme.group_size}, a process would hold {rows} rows and "
            f"{part} columns of it; expected whole groups, and 8 rows that share a word of zero points: use fewer "
            "processes, or convert the model with a smaller --group-size"
        )
    return rows, part


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that several share."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
