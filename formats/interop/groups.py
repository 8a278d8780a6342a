"""Some rows of a matrix, and groups in smaller ones, which repeat the scale and the zero point: the same weights."""

import torch

from formats.codec import Quantized, pack_zero_point, unpack_zero_point
from formats.layout import ROW_WISE, Scheme


def cut(matrix: Quantized, rows: range) -> Quantized:
    """The `rows`, which follow one another, of a matrix; zero points are packed again, for eight rows share a word."""
    chosen = slice(rows.start, rows.stop)
    zero = matrix.zero_point
    if zero is not None and len(rows) != len(matrix.packed):
        zero = pack_zero_point(unpack_zero_point(zero, len(matrix.packed))[chosen])
    return Quantized(matrix.packed[chosen], matrix.scale[chosen], zero)


def can_split(columns: int, scheme: Scheme, group_size: int) -> bool:
    """Whether equal groups of `group_size` fill a row, and each lies in one group of `scheme`."""
    step = columns if group_size == ROW_WISE else group_size
    return columns % step == 0 and (scheme.groups(columns) == 1 or scheme.group_width(columns) % step == 0)


def split(matrix: Quantized, columns: int, scheme: Scheme, group_size: int) -> Quantized:
    """`matrix` of `scheme`, of so many columns, in groups of `group_size`, where `can_split` says so."""
    step = columns if group_size == ROW_WISE else group_size
    places = torch.arange(0, columns, step) // scheme.group_width(columns)
    packed, *grouped = matrix.tensors()
    return Quantized(packed, *(tensor[:, places] for tensor in grouped))
