"""int4 × fp16/bf16 for a mixture of experts: rows sorted by expert, each tile with the matrix of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from formats.codec import Quantized
from formats.layout import Scheme, ceil_div
from runtime.kernels.tile import tile_product, weight_arguments

BLOCK_N = 64
MAX_BLOCK_M = 64


@triton.jit
def grouped_kernel(
    x_ptr, y_ptr, ends_ptr,
    packed_ptr, scale_ptr, zero_ptr, N, K, words, groups, width, zero_rows,
    E: tl.constexpr, EXPERTS: tl.constexpr,
    SYMMETRIC: tl.constexpr, ONE_SCALE: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of one expert's W × BLOCK_M of its tokens; tiles are counted expert by expert."""
    each = tl.arange(0, EXPERTS)
    end = tl.load(ends_ptr + each, mask=each < E, other=0).to(tl.int32)
    begin = tl.load(ends_ptr + each - 1, mask=(each > 0) & (each < E), other=0).to(tl.int32)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    behind = tl.cumsum(tiles, 0)  # tiles up to and with each expert's
    tile = tl.program_id(1)
    expert = tl.sum(((behind <= tile) & (each < E)).to(tl.int32), 0)
    if expert < E:
        mine = each == expert
        first = tl.sum(tl.where(mine, begin + (tile - behind + tiles) * BLOCK_M, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = first + tl.arange(0, BLOCK_M)
        matrix = expert.to(tl.int64)
        y = tile_product(
            x_ptr, row, token, 0, K, last,
            packed_ptr + matrix * N * words, scale_ptr + matrix * N * groups, zero_ptr + matrix * zero_rows * groups,
            N, K, words, groups, width,
            SYMMETRIC, ONE_SCALE, QUADS, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        at = token.to(tl.int64)[None, :] * N + row[:, None]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(token < last)[None, :] & (row < N)[:, None])


def grouped(x: Tensor, ends: Tensor, stack: Quantized, scheme: Scheme) -> Tensor:
    """Contiguous x [S, K], sorted by expert · Ŵ[expert] [E, N, K]ᵀ → [S, N] in the type of x.

    `ends` [E] says behind which row each expert's end, the last behind all. Nothing waits for the GPU.
    """
    (size, columns), (experts, rows, _) = x.shape, stack.packed.shape
    (_, _, _, *sizes), constants = weight_arguments(stack.matrix(0), columns, scheme)
    zero_point = stack.packed if stack.zero_point is None else stack.zero_point  # unused when symmetric
    y = x.new_empty(size, rows)
    block_m = min(MAX_BLOCK_M, max(16, triton.next_power_of_2(ceil_div(size, experts))))
    most = size // block_m + min(experts, size)  # every expert may have a tile that is not full
    with torch.cuda.device_of(x):  # Triton launches on the current device
        grouped_kernel[(ceil_div(rows, BLOCK_N), most)](
            x, y, ends, stack.packed, stack.scale, zero_point, *sizes, zero_point.shape[1],
            E=experts, EXPERTS=triton.next_power_of_2(experts), BLOCK_N=BLOCK_N, BLOCK_M=block_m, **constants,
        )  # fmt: skip
    return y
