"""The plain baseline: scale = max|w| / 7, or min–max with zero points."""

import torch
from torch import Tensor

from formats import codec
from formats.devices import has_triton
from formats.layout import Scheme


def absmax(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> codec.Quantized:
    """Quantise `weight` [N, K] with `codec.absmax` scales: one kernel on a GPU, the codec elsewhere, the same bytes.

    Raises `NonFiniteError` on NaN or infinity.
    """
    if not has_triton(weight.device):
        return codec.quantize(weight, scheme, scale_dtype)
    from converter.quantize import kernels

    return kernels.absmax(weight, scheme, scale_dtype)
