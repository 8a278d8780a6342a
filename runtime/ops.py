"""The operator `int4::linear`, which torch.compile and CUDA graphs take whole, and the choice of its kernel."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.codec import Quantized, dequantize
from formats.layout import Scheme

HAS_TRITON = find_spec("triton") is not None  # not on every platform; elsewhere torch does the work
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
SPLIT_K_BELOW = 16  # tokens; fewer leave most of the GPU idle unless K is shared out


# By schema: a decorated custom_op costs the host several times as much a call.
torch.library.define(
    "int4::linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int group_size) -> Tensor",
)
int4_linear: Callable[..., Tensor] = torch.ops.int4.linear.default


def _linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """x [..., K] · Ŵ [N, K]ᵀ + bias [N] → [..., N], in the type of x, accumulated in fp32 (see `formats.codec`).

    `packed` and `scale` are the format's, or both in kernel order (`repack.arrange`): then `packed` is 3-D.
    """
    scheme = Scheme(group_size, symmetric=zero_point is None)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    y = _product(tokens, packed, scale, zero_point, bias, scheme)
    return y.view(*x.shape[:-1], y.shape[-1])


def _fake_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[1] if packed.dim() == 3 else scale.shape[0])


torch.library.impl("int4::linear", "default", _linear)
torch.library.register_fake("int4::linear", _fake_linear)


def on_hopper(device: torch.device) -> bool:
    """Whether `device` is a GPU with the kernels of `kernels.hopper`, and this Triton has Gluon to build them."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return HAS_TRITON and find_spec("triton.experimental.gluon") is not None


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, scheme: Scheme
) -> Tensor:
    """The product of x [M, K] by the fastest kernel for its size, type and device."""
    quantized = Quantized(packed, scale, zero_point)
    if packed.dim() == 3:
        if len(x) and x.dtype == scale.dtype:
            from runtime.kernels.hopper import hopper_product

            return hopper_product(x, packed, scale, bias, scheme)
        from runtime.repack import restore

        quantized = restore(packed, scale, x.shape[1])
    if not (HAS_TRITON and x.is_cuda and x.dtype in KERNEL_DTYPES and len(x)):
        return dequantized_product(x, quantized, bias, scheme)
    from runtime.kernels.matmul import matmul
    from runtime.kernels.splitk import splitk

    return (splitk if len(x) < SPLIT_K_BELOW else matmul)(x, quantized, bias, scheme)


def dequantized_product(x: Tensor, quantized: Quantized, bias: Tensor | None, scheme: Scheme) -> Tensor:
    """x [M, K] · Ŵ [N, K]ᵀ + bias [N] → [M, N] by way of the whole Ŵ in the type of x; right on every device."""
    weight = dequantize(quantized, x.shape[1], scheme, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
