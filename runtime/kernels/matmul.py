"""int4 × fp16/bf16 for many tokens: one tensor-core tile of the output a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from formats.codec import Quantized
from formats.layout import Scheme, ceil_div
from runtime.kernels.tile import tile_product, weight_arguments

BLOCK_N = 128
MAX_BLOCK_M = 128


@triton.jit
def matmul_kernel(
    x_ptr, y_ptr, bias_ptr, M,
    packed_ptr, scale_ptr, zero_ptr, N, K, words, groups, width,
    HAS_BIAS: tl.constexpr, SYMMETRIC: tl.constexpr, ONE_SCALE: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of W × BLOCK_M tokens; neighbours share the weights in the cache."""
    token_tiles = tl.cdiv(M, BLOCK_M)
    row = tl.program_id(0) // token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    y = tile_product(
        x_ptr, row, token, 0, K, M,
        packed_ptr, scale_ptr, zero_ptr, N, K, words, groups, width,
        SYMMETRIC, ONE_SCALE, QUADS, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    at = token.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(token < M)[None, :] & (row < N)[:, None])


def matmul(
    x: Tensor, quantized: Quantized, bias: Tensor | None, scheme: Scheme, *,
    block_n: int = BLOCK_N, max_block_m: int = MAX_BLOCK_M,
) -> Tensor:  # fmt: skip
    """Contiguous x [M, K] · Ŵ [N, K]ᵀ + bias [N] → [M, N] in the type of x."""
    tokens, columns = x.shape
    weight, constants = weight_arguments(quantized, columns, scheme)
    rows = quantized.packed.shape[0]
    y = x.new_empty(tokens, rows)
    block_m = min(max_block_m, max(16, triton.next_power_of_2(tokens)))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        matmul_kernel[(ceil_div(rows, block_n) * ceil_div(tokens, block_m),)](
            x, y, x if bias is None else bias, tokens, *weight,
            HAS_BIAS=bias is not None, BLOCK_N=block_n, BLOCK_M=block_m, **constants,
            num_warps=8 if block_m >= MAX_BLOCK_M else 4,
        )  # fmt: skip
    return y
