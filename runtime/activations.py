"""The definition of 8-bit activations: e4m3 with one scale a token."""

import torch
from torch import Tensor

LARGEST = 448.0  # in e4m3
SMALLEST = 2.0**-126


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [M, K] → e4m3 [M, K] of x · (1 / scale) and scales fp32 [M], max|x| · (1 / 448); x ≈ e4m3 · scale."""
    scale = (x.float().abs().amax(1) * (1 / LARGEST)).clamp(min=SMALLEST)
    return (x.float() * (1 / scale)[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def rounded_to_fp8(x: Tensor) -> Tensor:
    """Tokens [M, K] with the values that e4m3 leaves them, in their own type."""
    codes, scale = to_fp8(x)
    return (codes.float() * scale[:, None]).to(x.dtype)
