"""Single matrices out of stacks, and rows out of matrices: the same codes, scales and zero points."""

from formats.codec import Quantized, pack_zero_point, unpack_zero_point


def expert(stack: Quantized, index: int) -> Quantized:
    """Matrix `index` [N, K] of a stack [E, N, K]."""
    zero = stack.zero_point
    return Quantized(stack.packed[index], stack.scale[index], None if zero is None else zero[index])


def cut(matrix: Quantized, rows: range) -> Quantized:
    """The `rows`, which follow one another, of a matrix; zero points are packed again, for eight rows share a word."""
    chosen = slice(rows.start, rows.stop)
    zero = matrix.zero_point
    if zero is not None and len(rows) != len(matrix.packed):
        zero = pack_zero_point(unpack_zero_point(zero, len(matrix.packed))[chosen])
    return Quantized(matrix.packed[chosen], matrix.scale[chosen], zero)
