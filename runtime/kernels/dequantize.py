"""Ŵ from the format's words, scales and zero points, in one pass; the bits of `codec.dequantize`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from formats.codec import Quantized
from formats.layout import Scheme, ceil_div

BLOCK_ROWS = 8
BLOCK_WORDS = 64


@triton.jit
def dequantize_kernel(
    w_ptr, packed_ptr, scale_ptr, zero_ptr, rows, N, K, words, groups, width,
    SYMMETRIC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS rows × BLOCK_WORDS words of them; `rows` counts those of all matrices, N of one."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    inside = (row < rows)[:, None] & (word < words)[None, :]
    packed = tl.load(packed_ptr + row.to(tl.int64)[:, None] * words + word[None, :], mask=inside, other=0)
    group = (word * 8) // width  # a word lies in one group
    scale = tl.load(scale_ptr + row.to(tl.int64)[:, None] * groups + group[None, :], mask=inside, other=0.0)
    code = ((packed[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 0xF) - 8
    if not SYMMETRIC:
        zero_row = (row // N).to(tl.int64) * tl.cdiv(N, 8) + row % N // 8
        zero = tl.load(zero_ptr + zero_row[:, None] * groups + group[None, :], mask=inside, other=0)
        code -= (((zero >> (row % N % 8 * 4)[:, None]) & 0xF) - 8)[:, :, None]
    w = tl.reshape(code.to(tl.float32) * scale.to(tl.float32)[:, :, None], (BLOCK_ROWS, BLOCK_WORDS * 8))
    column = tl.program_id(1) * BLOCK_WORDS * 8 + tl.arange(0, BLOCK_WORDS * 8)
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < K)[None, :])


def dequantize(quantized: Quantized, columns: int, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """(code − zero) · scale as `dtype`, [N, K] or [E, N, K] as `quantized` is."""
    *shape, words = quantized.packed.shape
    w = quantized.packed.new_empty((*shape, columns), dtype=dtype)
    rows = w.numel() // columns
    zero_point = quantized.packed if quantized.zero_point is None else quantized.zero_point  # unused when symmetric
    grid = (ceil_div(rows, BLOCK_ROWS), ceil_div(words, BLOCK_WORDS))
    with torch.cuda.device_of(w):  # Triton launches on the current device
        dequantize_kernel[grid](
            w, quantized.packed, quantized.scale, zero_point,
            rows, shape[-1], columns, words, scheme.groups(columns), scheme.group_width(columns),
            SYMMETRIC=scheme.symmetric, BLOCK_ROWS=BLOCK_ROWS, BLOCK_WORDS=BLOCK_WORDS,
        )  # fmt: skip
    return w
