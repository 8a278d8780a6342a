"""The operator `int4::linear`, which torch.compile and CUDA graphs take whole, and the choice of its kernel."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.codec import Quantized, dequantize
from formats.layout import Scheme

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
SPLIT_K_BELOW = 16  # tokens; fewer leave most of the GPU idle unless K is shared out


Product = Callable[[Tensor, Quantized, Tensor | None, Scheme], Tensor]


@torch.library.custom_op("int4::linear", mutates_args=())
def int4_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """x [..., K] · Ŵ [N, K]ᵀ + bias [N] → [..., N], in the type of x, accumulated in fp32 (see `formats.codec`)."""
    columns, rows = x.shape[-1], packed.shape[0]
    scheme = Scheme(group_size, symmetric=zero_point is None)
    quantized = Quantized(packed, scale, zero_point)
    tokens = x.reshape(-1, columns).contiguous()
    product = _choose(tokens)
    return product(tokens, quantized, bias, scheme).view(*x.shape[:-1], rows)


@int4_linear.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _choose(tokens: Tensor) -> Product:
    """The kernel for `tokens` [M, K] by their number, type and device."""
    if not (tokens.is_cuda and tokens.dtype in KERNEL_DTYPES and len(tokens)):
        return dequantized_product
    try:
        from runtime.kernels.matmul import matmul
        from runtime.kernels.splitk import splitk
    except ImportError:  # no Triton on this platform
        return dequantized_product
    return splitk if len(tokens) < SPLIT_K_BELOW else matmul


def dequantized_product(x: Tensor, quantized: Quantized, bias: Tensor | None, scheme: Scheme) -> Tensor:
    """x [M, K] · Ŵ [N, K]ᵀ + bias [N] → [M, N] by way of the whole Ŵ in the type of x; right on every device."""
    weight = dequantize(quantized, x.shape[1], scheme, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
