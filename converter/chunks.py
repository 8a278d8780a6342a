"""How tensors are cut on their way: what goes together, and how much of it at once."""

from converter.plan import TensorPlan
from formats.layout import CODES_PER_WORD, DTYPE_BYTES, TensorSpec

CHUNK_BYTES = 16 << 20  # of a source tensor on its way at once, unless rows that go together are larger


def chunk_bytes(spec: TensorSpec, rows: int | None) -> int:
    """Of a tensor on its way at once: so many `rows`, or a multiple of them, or without them any number of bytes."""
    unit = 1 if rows is None else max(1, rows * spec.shape[-1] * DTYPE_BYTES[spec.dtype])
    return max(1, CHUNK_BYTES // unit) * unit


def is_whole(tensor: TensorPlan) -> bool:
    """Whether the matrices of a tensor are worked on each for itself, and whole.

    To be turned, or because words of zero points would reach from one of a stack into the next.
    """
    return tensor.transposed or (len(tensor.spec.shape) > 2 and tensor.spec.shape[-2] % CODES_PER_WORD != 0)


def unit_rows(tensor: TensorPlan) -> int:
    """Stored rows that are worked on together: a matrix, or `block_unit`."""
    return tensor.spec.shape[-2] if is_whole(tensor) else block_unit(tensor)


def block_unit(tensor: TensorPlan) -> int:
    """Rows of a matrix that stay together: 8, along which zero points are packed, or without any one, if it is wide."""
    has_zero_points = len(tensor.stored) > 2
    is_wide = CODES_PER_WORD * tensor.matrix.shape[-1] * DTYPE_BYTES[tensor.spec.dtype] > CHUNK_BYTES
    return 1 if is_wide and not has_zero_points else CODES_PER_WORD
