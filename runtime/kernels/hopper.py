"""The Hopper kernels as one: which matrices they take, and a call to the fastest of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from formats.codec import Quantized
from formats.layout import Scheme
from runtime.kernels.hopper_batch import batch
from runtime.kernels.hopper_choice import choose
from runtime.kernels.hopper_decode import decode
from runtime.kernels.hopper_fp8 import fp8
from runtime.kernels.hopper_prefill import prefill

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"decode": decode, "batch": batch, "prefill": prefill, "fp8": fp8}
ALIGNMENT = 8  # of rows and columns: the copy engine moves 16 bytes at a time
TILE_COLUMNS = 16
ONE_GROUP = 1 << 30


def takes(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether the kernels can run a matrix [rows, columns] with scales of type `dtype`."""
    return (
        dtype in (torch.bfloat16, torch.float16)
        and rows % ALIGNMENT == 0
        and columns % ALIGNMENT == 0
        and (scheme.groups(columns) == 1 or scheme.group_size % TILE_COLUMNS == 0)
    )


def hopper_product(x: Tensor, matrix: Quantized, bias: Tensor | None, group_size: int, *, fp8: bool = False) -> Tensor:
    """Contiguous x [M, K] · Ŵᵀ + bias → [M, N] for a matrix in kernel order with scales of the type of x.

    With `fp8` x is rounded to e4m3 on the way, which wants a symmetric matrix and groups of a multiple of 64 columns.
    """
    tokens, columns = x.shape
    kernel, options = choose(tokens, matrix.scale.shape[1], columns, "fp8" if fp8 else "bf16")
    group = ONE_GROUP if matrix.scale.shape[0] == 1 else group_size
    if x.data_ptr() % 16:
        x = x.clone()
    if bias is not None:
        bias = bias.to(x.dtype)
    return KERNELS[kernel](x, matrix.packed, matrix.scale, matrix.zero_point, bias, group, **options)
