"""The operators `int4::linear` and `int4::grouped_linear`, which torch.compile takes whole, and their kernels."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.codec import Quantized, dequantize
from formats.devices import has_triton
from formats.layout import Scheme
from runtime.activations import rounded_to_fp8

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
# Tokens, and rows an expert, from which a matrix is dequantised for torch's product: measured on an H200.
DEQUANTIZE_FROM, DEQUANTIZE_FROM_EACH = 256, 128
UNIT = 8  # elements in the 16 bytes to which torch's products want rows aligned
SPLIT_K_BELOW = 16  # tokens; fewer leave most of the GPU idle unless K is shared out
FP8_TOKENS = 1024  # with fewer the bytes of the weights decide the time, and fp8 would only cost precision
FP8_COLUMNS = 64  # of a group, at least: the tensor cores add this many before its scale comes in

# By schema: a decorated custom_op costs the host several times as much a call.
torch.library.define(
    "int4::linear",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int group_size, bool fp8=False)"
    " -> Tensor",
)
torch.library.define(
    "int4::linear_grad",
    "(Tensor grad, Tensor packed, Tensor scale, Tensor? zero_point, int columns, int group_size) -> Tensor",
)
torch.library.define(
    "int4::grouped_linear",
    "(Tensor x, Tensor ends, Tensor packed, Tensor scale, Tensor? zero_point, int group_size) -> Tensor",
)
torch.library.define(
    "int4::grouped_linear_grad",
    "(Tensor grad, Tensor ends, Tensor packed, Tensor scale, Tensor? zero_point, int columns, int group_size)"
    " -> Tensor",
)
int4_linear: Callable[..., Tensor] = torch.ops.int4.linear.default
int4_grouped_linear: Callable[..., Tensor] = torch.ops.int4.grouped_linear.default


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    fp8: bool = False,
) -> Tensor:
    """x [..., K] · Ŵ [N, K]ᵀ + bias [N] → [..., N], in the type of x, accumulated in fp32 (see `formats.codec`).

    `packed`, `scale` and `zero_point` are the format's, or all in kernel order (`repack.arrange`): then `packed` is
    3-D. With `fp8`, x is rounded as `activations` says, where there are enough tokens.
    """
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    fp8 = fp8 and tokens.shape[0] >= FP8_TOKENS
    y = _product(tokens, Quantized(packed, scale, zero_point), bias, group_size, fp8)
    return y.view(*x.shape[:-1], y.shape[-1])


def _fake_linear(x: Tensor, packed: Tensor, scale: Tensor, *rest: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[1] if packed.dim() == 3 else scale.shape[0])


def _linear_grad(
    grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, group_size: int
) -> Tensor:
    """The gradient of x [..., K]: grad [..., N] · Ŵ."""
    scheme = Scheme(group_size, symmetric=zero_point is None)
    return grad @ dequantized(in_format(Quantized(packed, scale, zero_point), columns), columns, scheme, grad.dtype)


def _fake_linear_grad(
    grad: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, group_size: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], columns)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero_point, bias, group_size, _ = inputs
    ctx.save_for_backward(packed, scale, zero_point)
    ctx.columns, ctx.group_size, ctx.bias_dtype = x.shape[-1], group_size, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = torch.ops.int4.linear_grad(grad, *ctx.saved_tensors, ctx.columns, ctx.group_size)
    if ctx.needs_input_grad[4]:
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return x_grad, None, None, None, bias_grad, None, None


torch.library.impl("int4::linear", "default", linear)
torch.library.register_fake("int4::linear", _fake_linear)
torch.library.register_autograd("int4::linear", _backward, setup_context=_keep_for_backward)
torch.library.impl("int4::linear_grad", "default", _linear_grad)
torch.library.register_fake("int4::linear_grad", _fake_linear_grad)


def grouped_linear(
    x: Tensor, ends: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int
) -> Tensor:
    """x [S, K], sorted by expert · Ŵ[expert] [E, N, K]ᵀ → [S, N], in the type of x, accumulated in fp32.

    `ends` [E] says behind which row of x each expert's end, the last behind all. The weights are the format's. With
    many rows an expert they are dequantised into memory of their own for a while: tensor cores then take them faster.
    """
    x, stack, scheme = x.contiguous(), Quantized(packed, scale, zero_point), Scheme(group_size, zero_point is None)
    experts, outputs, _ = packed.shape
    if x.dtype in KERNEL_DTYPES and len(x) and has_triton(x.device):
        if len(x) >= DEQUANTIZE_FROM_EACH * experts and _takes_groups(x, outputs):
            return F.grouped_mm(x, dequantized(stack, x.shape[1], scheme, x.dtype).mT, offs=ends.to(torch.int32))
        from runtime.kernels.grouped import grouped

        return grouped(x, ends, stack, scheme)
    y = x.new_empty(len(x), outputs)
    for matrix, rows in _by_expert(ends, stack):
        y[rows] = dequantized_product(x[rows], matrix, None, scheme)
    return y


def _fake_grouped_linear(x: Tensor, ends: Tensor, packed: Tensor, *rest: object) -> Tensor:
    return x.new_empty(len(x), packed.shape[1])


def _keep_stack_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ends, packed, scale, zero_point, group_size = inputs
    ctx.save_for_backward(ends, packed, scale, zero_point)
    ctx.columns, ctx.group_size = x.shape[-1], group_size


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad = torch.ops.int4.grouped_linear_grad(grad, *ctx.saved_tensors, ctx.columns, ctx.group_size)
    return x_grad, None, None, None, None, None


def _grouped_linear_grad(
    grad: Tensor, ends: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, group_size: int
) -> Tensor:
    """The gradient of x [S, K]: grad [S, N] · Ŵ[expert]; 0 in rows behind the last end."""
    scheme = Scheme(group_size, zero_point is None)
    x_grad = grad.new_zeros(len(grad), columns)
    for matrix, rows in _by_expert(ends, Quantized(packed, scale, zero_point)):
        x_grad[rows] = grad[rows] @ dequantized(matrix, columns, scheme, grad.dtype)
    return x_grad


def _fake_grouped_linear_grad(
    grad: Tensor, ends: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, group_size: int
) -> Tensor:
    return grad.new_empty(len(grad), columns)


def _by_expert(ends: Tensor, stack: Quantized) -> Iterator[tuple[Quantized, slice]]:
    """The matrix of each expert that has rows, and which."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield stack.matrix(expert), slice(begin, end)
        begin = end


torch.library.impl("int4::grouped_linear", "default", grouped_linear)
torch.library.register_fake("int4::grouped_linear", _fake_grouped_linear)
torch.library.impl("int4::grouped_linear_grad", "default", _grouped_linear_grad)
torch.library.register_fake("int4::grouped_linear_grad", _fake_grouped_linear_grad)
torch.library.register_autograd("int4::grouped_linear", _grouped_backward, setup_context=_keep_stack_for_backward)


def on_hopper(device: torch.device) -> bool:
    """Whether `device` is a GPU with the kernels of `kernels.hopper`, and this Triton has Gluon to build them."""
    if not has_triton(device) or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return find_spec("triton.experimental.gluon") is not None


def _product(x: Tensor, matrix: Quantized, bias: Tensor | None, group_size: int, fp8: bool) -> Tensor:
    """The product of x [M, K] by the fastest kernel for its size, type and device."""
    arranged = matrix.packed.dim() == 3 and x.shape[0] > 0 and x.dtype == matrix.scale.dtype
    if fp8 and not (arranged and in_fp8(group_size, matrix)):
        x, fp8 = rounded_to_fp8(x), False
    if arranged:
        from runtime.kernels.hopper import hopper_product

        return hopper_product(x, matrix, bias, group_size, fp8=fp8)
    quantized = in_format(matrix, x.shape[1])
    scheme = Scheme(group_size, symmetric=quantized.zero_point is None)
    many = len(x) >= DEQUANTIZE_FROM and len(quantized.packed) % UNIT == 0
    if many or not (x.dtype in KERNEL_DTYPES and len(x) and has_triton(x.device)):
        return dequantized_product(x, quantized, bias, scheme)
    from runtime.kernels.matmul import matmul
    from runtime.kernels.splitk import splitk

    return (splitk if len(x) < SPLIT_K_BELOW else matmul)(x, quantized, bias, scheme)


def in_fp8(group_size: int, matrix: Quantized) -> bool:
    """Whether the fp8 tensor cores can take the codes of a matrix in kernel order as they are."""
    return matrix.zero_point is None and (matrix.scale.shape[0] == 1 or group_size % FP8_COLUMNS == 0)


def in_format(matrix: Quantized, columns: int) -> Quantized:
    """The format's tensors of a matrix in either order."""
    if matrix.packed.dim() == 3:
        from runtime.repack import restore

        return restore(matrix, columns)
    return matrix


def dequantized(quantized: Quantized, columns: int, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Ŵ as `dtype`, [N, K] or a stack [E, N, K], by one kernel on a GPU; the bits are the codec's.

    Where a model's own code reads a weight, a compiler traces this: it gets the codec, which it makes one kernel of.
    """
    if not torch.compiler.is_compiling() and quantized.packed.numel() and has_triton(quantized.packed.device):
        from runtime.kernels.dequantize import dequantize as by_kernel

        return by_kernel(quantized, columns, scheme, dtype)
    return dequantize(quantized, columns, scheme, dtype)


def _takes_groups(x: Tensor, rows: int) -> bool:
    """Whether torch's product in groups, of bf16 on a GPU of capability 8 or later, takes matrices of so many rows."""
    sizes = x.shape[1] % UNIT == 0 and rows % UNIT == 0
    return x.dtype == torch.bfloat16 and sizes and torch.cuda.get_device_capability(x.device) >= (8, 0)


def dequantized_product(x: Tensor, quantized: Quantized, bias: Tensor | None, scheme: Scheme) -> Tensor:
    """x [M, K] · Ŵ [N, K]ᵀ + bias [N] → [M, N] by way of the whole Ŵ in the type of x; right on every device."""
    weight = dequantized(quantized, x.shape[1], scheme, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
