"""Triton kernels that quantise in one pass over the weights, bit for bit as the codec does."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from formats.codec import MIN_SCALE, Quantized, check_finite, pack_zero_point
from formats.layout import CODES_PER_WORD, Scheme, ceil_div

TILE_WORDS = 512  # words (of 8 weights) that one program holds in registers
WARPS = 4
MAX_CHUNK_WORDS = 1024  # a longer group is walked in chunks, twice; the second time it comes from the cache


@triton.jit
def _load(w_ptr, row, first, offset, width, rows, columns):
    """Weights [ROWS, WORDS, 8] of a group from its word `offset` on, as fp32; 0 outside, and where they are inside."""
    in_group = offset[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    column = first + in_group
    inside = (row[:, None, None] < rows) & (in_group < width) & (column < columns)
    w = tl.load(w_ptr + row[:, None, None].to(tl.int64) * columns + column, mask=inside, other=0.0)
    return w.to(tl.float32), inside


@triton.jit
def _range(w):
    """Smallest and largest weight of each row of a tile [ROWS, WORDS, 8]."""
    return tl.min(tl.min(w, 2), 1), tl.max(tl.max(w, 2), 1)


@triton.jit
def _count_bad(w):
    # Counted on its own: tl.max and tl.min pass over NaN.
    bad = (w != w) | (tl.abs(w) == float("inf"))
    return tl.sum(tl.sum(tl.sum(bad.to(tl.int32), 2), 1), 0)


@triton.jit
def _as_stored(x, SCALE: tl.constexpr):
    """fp32 → the nearest value of SCALE, half to even, as fp32."""
    if SCALE == tl.bfloat16:
        # In integers, because Triton's interpreter cuts bf16 off instead of rounding it.
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(SCALE).to(tl.float32)


@triton.jit
def _scale(low, high, SCALE: tl.constexpr, SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale as stored (in fp32) and zero point of each row, from the range of its weights."""
    low = tl.minimum(low, 0.0)
    high = tl.maximum(high, 0.0)
    if SYMMETRIC:
        exact = tl.div_rn(tl.maximum(-low, high), 7.0)
    else:
        exact = tl.div_rn(high, 15.0) - tl.div_rn(low, 15.0)
    scale = tl.maximum(_as_stored(exact, SCALE), SMALLEST)
    scale = tl.where(exact == 0.0, 1.0, scale)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = _round(tl.clamp(-8.0 - tl.div_rn(low, scale), -8.0, 7.0))
    return scale, zero


@triton.jit
def _round(x):
    """Round half to even, for |x| < 2²²: adding 1.5 · 2²³ leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _pack(w, inside, scale, zero):
    """Words [ROWS, WORDS] of weights [ROWS, WORDS, 8]; code 0 outside."""
    z = zero[:, None, None]
    code = _round(tl.clamp(tl.div_rn(w, scale[:, None, None]), -8.0 - z, 7.0 - z)) + z
    nibble = tl.where(inside, code, 0.0).to(tl.int32) + 8
    return tl.sum(nibble << (4 * tl.arange(0, 8))[None, None, :], 2)


@triton.jit
def absmax_kernel(
    w_ptr, packed_ptr, scale_ptr, zero_ptr, bad_ptr,
    rows, columns, width, words, groups,
    SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one group, of CHUNKS chunks of WORDS words."""
    row = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) % groups
    first = group * width
    chunk = tl.arange(0, WORDS)
    SCALE: tl.constexpr = scale_ptr.dtype.element_ty

    w, inside = _load(w_ptr, row, first, chunk, width, rows, columns)
    low, high = _range(w)
    bad = _count_bad(w)
    for i in range(1, CHUNKS):
        more, _ = _load(w_ptr, row, first, chunk + i * WORDS, width, rows, columns)
        more_low, more_high = _range(more)
        low, high = tl.minimum(low, more_low), tl.maximum(high, more_high)
        bad += _count_bad(more)
    if bad > 0:
        tl.atomic_max(bad_ptr, 1)

    scale, zero = _scale(low, high, SCALE, SMALLEST, SYMMETRIC)
    scale_at = row.to(tl.int64) * groups + group
    tl.store(scale_ptr + scale_at, scale.to(SCALE), mask=row < rows)
    if not SYMMETRIC:
        tl.store(zero_ptr + scale_at, zero.to(tl.int8), mask=row < rows)

    for i in range(CHUNKS):
        offset = chunk + i * WORDS
        if i > 0:
            w, inside = _load(w_ptr, row, first, offset, width, rows, columns)
        word = first // 8 + offset
        packed = _pack(w, inside, scale, zero)
        mask = (row[:, None] < rows) & (offset * 8 < width)[None, :] & (word < words)[None, :]
        tl.store(packed_ptr + row[:, None].to(tl.int64) * words + word[None, :], packed, mask=mask)


def absmax(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """`formats.codec.quantize` of a contiguous `weight` [N, K] (bf16, fp16 or fp32) as one kernel.

    Raises `NonFiniteError` on NaN or infinity.
    """
    quantized, bad = launch(weight, scheme, scale_dtype)
    if bad.item():
        check_finite(weight)
    return quantized


def launch(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, *, tile_words: int = TILE_WORDS, warps: int = WARPS
) -> tuple[Quantized, Tensor]:
    """The work of `absmax` without waiting for it, and a flag [1] that will be set if a weight is not finite."""
    rows, columns = weight.shape
    width, groups = scheme.group_width(columns), scheme.groups(columns)
    words = ceil_div(columns, CODES_PER_WORD)
    group_words = triton.next_power_of_2(ceil_div(width, CODES_PER_WORD))
    chunk_words = min(group_words, MAX_CHUNK_WORDS)
    tile_rows = max(1, tile_words // chunk_words)
    packed = weight.new_empty((rows, words), dtype=torch.int32)
    scale = weight.new_empty((rows, groups), dtype=scale_dtype)
    zero = weight.new_empty((rows, groups), dtype=torch.int8)
    bad = weight.new_zeros(1, dtype=torch.int32)
    grid = (ceil_div(rows, tile_rows) * groups,)  # one axis: a second ends at 65535
    with torch.cuda.device_of(weight):  # Triton launches on the current GPU, whichever holds the weight
        absmax_kernel[grid](
            weight, packed, scale, zero, bad,
            rows, columns, width, words, groups,
            MIN_SCALE[scale_dtype], scheme.symmetric, tile_rows, chunk_words, ceil_div(group_words, chunk_words),
            num_warps=warps,
        )  # fmt: skip
    return Quantized(packed, scale, None if scheme.symmetric else pack_zero_point(zero)), bad
