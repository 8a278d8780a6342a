"""Groups in smaller ones, which repeat the scale and the zero point: the same weights, to the bit."""

import torch

from formats.codec import Quantized
from formats.layout import ROW_WISE, Scheme


def can_split(columns: int, scheme: Scheme, group_size: int) -> bool:
    """Whether equal groups of `group_size` fill a row, and each lies in one group of `scheme`."""
    step = columns if group_size == ROW_WISE else group_size
    return columns % step == 0 and (scheme.groups(columns) == 1 or scheme.group_width(columns) % step == 0)


def split(matrix: Quantized, columns: int, scheme: Scheme, group_size: int) -> Quantized:
    """`matrix` of `scheme`, of so many columns, in groups of `group_size`, where `can_split` says so."""
    step = columns if group_size == ROW_WISE else group_size
    places = torch.arange(0, columns, step) // scheme.group_width(columns)
    zero = matrix.zero_point
    return Quantized(matrix.packed, matrix.scale[:, places], None if zero is None else zero[:, places])
