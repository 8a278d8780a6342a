"""The same weights by a scale of the other sign."""

import torch
from torch import Tensor


def mirrored(codes: Tensor, zero: Tensor, scale: Tensor, where: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [N, K], zero points int8 [N, G] and scales [N, G]: in the groups `where` [N, G] of the other sign.

    A group has `width` columns, the last one perhaps fewer.

    (c − z) · s = ((−1 − c) − (−1 − z)) · −s, and −1 − c, which is ~c, is a code if c is: exact for every code.
    """
    wide = where.repeat_interleave(width, dim=1)[:, : codes.shape[1]]
    return torch.where(wide, ~codes, codes), torch.where(where, ~zero, zero), torch.where(where, -scale, scale)
