"""int4 × fp16/bf16 for few tokens: K is shared out among programs, and their sums are added in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from formats.codec import Quantized
from formats.layout import Scheme, ceil_div
from runtime.kernels.tile import tile_product, weight_arguments

BLOCK_N = 64
BLOCK_M = 16  # the narrowest tile that tensor cores take
BLOCK_REDUCE = 1024
PROGRAMS_PER_PROCESSOR = 4
INTERPRETED_PROCESSORS = 8


@triton.jit
def splitk_kernel(
    x_ptr, partial_ptr, M, steps,
    packed_ptr, scale_ptr, zero_ptr, N, K, words, groups, width,
    SYMMETRIC: tl.constexpr, ONE_SCALE: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows × BLOCK_M tokens × `steps` blocks of K, into partial [splits, M, N] fp32."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = split * steps * BLOCK_K
    y = tile_product(
        x_ptr, row, token, begin, tl.minimum(begin + steps * BLOCK_K, K), M,
        packed_ptr, scale_ptr, zero_ptr, N, K, words, groups, width,
        SYMMETRIC, ONE_SCALE, QUADS, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    at = (split.to(tl.int64) * M + token)[None, :] * N + row[:, None]
    tl.store(partial_ptr + at, y, mask=(token < M)[None, :] & (row < N)[:, None])


@triton.jit
def reduce_kernel(
    partial_ptr, y_ptr, bias_ptr, size, N, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [M, N] = Σ partial [splits, M, N] + bias, split by split."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    y = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        y += tl.load(partial_ptr + split * size + at, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def splitk(x: Tensor, quantized: Quantized, bias: Tensor | None, scheme: Scheme, *, block_n: int = BLOCK_N) -> Tensor:
    """Contiguous x [M, K] · Ŵ [N, K]ᵀ + bias [N] → [M, N] in the type of x; the same bits every run."""
    tokens, columns = x.shape
    weight, constants = weight_arguments(quantized, columns, scheme)
    rows = quantized.packed.shape[0]
    steps = _steps(
        ceil_div(rows, block_n) * ceil_div(tokens, BLOCK_M), ceil_div(columns, constants["BLOCK_K"]), x.device
    )
    splits = ceil_div(ceil_div(columns, constants["BLOCK_K"]), steps)
    partial = x.new_empty((splits, tokens, rows), dtype=torch.float32)
    y = x.new_empty(tokens, rows)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        splitk_kernel[(ceil_div(rows, block_n), splits, ceil_div(tokens, BLOCK_M))](
            x, partial, tokens, steps, *weight, BLOCK_N=block_n, BLOCK_M=BLOCK_M, **constants
        )
        reduce_kernel[(ceil_div(y.numel(), BLOCK_REDUCE),)](
            partial, y, x if bias is None else bias, y.numel(), rows, splits,
            HAS_BIAS=bias is not None, BLOCK=BLOCK_REDUCE,
        )  # fmt: skip
    return y


def _steps(tiles: int, blocks: int, device: torch.device) -> int:
    """Blocks of K that one program takes, so that all together fill the GPU a few times."""
    processors = INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = max(1, PROGRAMS_PER_PROCESSOR * processors // tiles)
    return ceil_div(blocks, splits)
