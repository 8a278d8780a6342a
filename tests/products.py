"""The reference that the tests and benchmarks of the matmul kernels share."""

from collections.abc import Callable

import torch
from checkpoints import random
from torch import Tensor

from formats import codec
from formats.layout import Scheme

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative: the output's own rounding, 2^-11 and 2^-8, leads


def operands(
    tokens: int, rows: int, columns: int, scheme: Scheme, dtype: torch.dtype, device: str
) -> tuple[Tensor, codec.Quantized, Tensor]:
    """x [M, K], the quantised W [N, K] and a bias [N]."""
    weight = random(rows, columns, seed=1, dtype=dtype).to(device)
    quantized = codec.quantize(weight, scheme, dtype)
    if scheme.symmetric:
        quantized.scale[::2] *= -1  # the format allows it
    x = random(tokens, columns, seed=2, dtype=dtype) * 20
    return x.to(device), quantized, random(rows, seed=3, dtype=dtype).to(device)


def check_product(
    product: Callable[..., Tensor],
    tokens: int, rows: int, columns: int, scheme: Scheme, dtype: torch.dtype, device: str, *, bias: bool,
) -> None:  # fmt: skip
    """`product` of the format's tensors must have the shape and type of a linear layer's, and its values."""
    x, quantized, b = operands(tokens, rows, columns, scheme, dtype, device)
    y = product(x, quantized, b if bias else None, scheme)
    assert y.shape == (tokens, rows)
    assert y.dtype == dtype
    assert relative_error(y, x, quantized, b if bias else None, scheme) <= TOLERANCE[dtype]


def relative_error(y: Tensor, x: Tensor, quantized: codec.Quantized, bias: Tensor | None, scheme: Scheme) -> float:
    """‖y − y₆₄‖ / ‖y₆₄‖ with y₆₄ in fp64 from the dequantised weight; NaN gives NaN, which passes no bound."""
    return distance(y, exact_product(x, quantized, bias, scheme))


def exact_product(x: Tensor, quantized: codec.Quantized, bias: Tensor | None, scheme: Scheme) -> Tensor:
    """x · Ŵᵀ + bias in fp64."""
    weight = codec.dequantize(quantized, x.shape[1], scheme, torch.float64)
    return x.double() @ weight.T + (0 if bias is None else bias.double())


def exact_grouped_product(x: Tensor, ends: Tensor, stack: codec.Quantized, scheme: Scheme) -> Tensor:
    """Each row of x · Ŵᵀ of its own expert in fp64; expert e's rows end behind `ends[e]`."""
    y = torch.zeros(len(x), stack.packed.shape[1], dtype=torch.float64, device=x.device)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        one = codec.Quantized(*(None if part is None else part[expert] for part in vars(stack).values()))
        y[begin:end] = exact_product(x[begin:end], one, None, scheme)
        begin = end
    return y


def distance(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in the wider of fp32 and the type of `exact`."""
    exact = exact.to(torch.promote_types(exact.dtype, torch.float32))
    return ((found.to(exact.dtype) - exact).norm() / exact.norm()).item()
