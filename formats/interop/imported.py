"""What a matrix of another format becomes in this one: the same weights, or an error."""

import torch
from torch import Tensor

from formats.codec import Quantized, pack, pack_zero_point, unpack, unpack_zero_point
from formats.errors import CheckpointError
from formats.interop.base import Layout, Parts
from formats.interop.proof import prove
from formats.interop.signs import mirrored
from formats.layout import Scheme


def imported(layout: Layout, parts: Parts, columns: int, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """The matrix `parts` of `layout` in this project's tensors, proven to mean the same weights.

    `scheme` has the layout's group size, and zero points or none. Raises `CheckpointError` for NaN and infinity,
    where the scales do not fit `scale_dtype`, or zero points do not fit the scheme.
    """
    _check_finite(parts)
    matrix = layout.restore(parts)
    packed, scale = matrix.packed, _exact(matrix.scale, scale_dtype)
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    if matrix.zero_point is not None:
        zero = unpack_zero_point(matrix.zero_point, len(scale))
    turned, dead = (zero == -1) & scheme.symmetric, scale == 0  # dead: all weights of the group are 0
    if turned.any() or dead.any():
        width = scheme.group_width(columns)
        codes, zero, scale = mirrored(unpack(packed, columns), zero, scale, turned, width)
        packed = pack(codes.masked_fill(dead.repeat_interleave(width, dim=1)[:, :columns], 0))
        zero, scale = zero.masked_fill(dead, 0), scale.masked_fill(dead, 1)
    if scheme.symmetric and (bad := int((zero != 0).sum())):
        raise CheckpointError(f"{bad} of {zero.numel()} groups have a zero point; give --scheme asym")
    found = Quantized(packed, scale, None if scheme.symmetric else pack_zero_point(zero))
    prove(layout, parts, found, columns, scheme)
    return found


def _check_finite(parts: Parts) -> None:
    for name, part in parts.items():
        if part.is_floating_point() and (bad := int((~part.isfinite()).sum())):
            raise CheckpointError(
                f"{bad} of {part.numel()} numbers in {name} are NaN or infinite, expected finite ones; "
                "convert the model that it was made from"
            )


def _exact(scale: Tensor, dtype: torch.dtype) -> Tensor:
    stored = scale.to(dtype)
    if bad := int((stored.float() != scale.float()).sum()):
        raise CheckpointError(f"{bad} of {scale.numel()} scales of {scale.dtype} do not fit {dtype} exactly")
    return stored
