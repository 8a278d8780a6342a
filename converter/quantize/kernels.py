"""Triton kernels that quantise in one pass over the weights, bit for bit as the codec does."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from formats.codec import MIN_SCALE, Quantized, check_finite, pack_zero_point
from formats.layout import CODES_PER_WORD, Scheme, ceil_div

TILE_WORDS = 512  # words (of 8 weights) that one program holds in registers
LANE_WORDS = 8  # of them for each lane of a warp
MAX_CHUNK_WORDS = 1024  # a longer group is walked in chunks, twice; the second time it comes from the cache


@triton.jit
def _load(w_ptr, row, first, offset, width, rows, columns):
    """Weights [GROUPS, WORDS, 8] from word `offset` of each group on, as fp32; 0 outside, and where they are inside."""
    in_group = offset[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    column = first[:, None, None] + in_group
    inside = (row[:, None, None] < rows) & (in_group < width) & (column < columns)
    w = tl.load(w_ptr + row[:, None, None].to(tl.int64) * columns + column, mask=inside, other=0.0)
    return w.to(tl.float32), inside


@triton.jit
def _range(w, SYMMETRIC: tl.constexpr):
    """Smallest and largest weight of each group of a tile [GROUPS, WORDS, 8]; if SYMMETRIC ∓ the largest magnitude."""
    if SYMMETRIC:
        high = tl.max(tl.max(tl.abs(w), 2), 1)
        low = -high
    else:
        low, high = tl.min(tl.min(w, 2), 1), tl.max(tl.max(w, 2), 1)
    return low, high


@triton.jit
def _not_a_number_if_bad(w):
    """0, or NaN if a group has NaN or infinity: looked for apart, because tl.max and tl.min pass over NaN."""
    return tl.sum(tl.sum(w * 0.0, 2), 1)


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
    """Scale as stored (in fp32) and zero point of each group, from the range of its weights."""
    low = tl.minimum(low, 0.0)
    high = tl.maximum(high, 0.0)
    if SYMMETRIC:
        exact = tl.div_rn(high, 7.0)
    else:
        exact = tl.div_rn(high, 15.0) - tl.div_rn(low, 15.0)
    scale = tl.maximum(_as_stored(exact, SCALE), SMALLEST)
    scale = tl.where(exact == 0.0, 1.0, scale)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = _round(tl.clamp(-8.0 - tl.div_rn(low, scale), -8.0, 7.0))
    return scale, zero


ROUND = tl.constexpr(1.5 * 2.0**23)  # what is added to a number < 2²² leaves no bits for a fraction: half to even
SNAP = tl.constexpr(1.5 * 2.0**9)  # leaves 14 bits


@triton.jit
def _round(x):
    """Round half to even, for |x| < 2²²."""
    return (x + ROUND) - ROUND


@triton.jit
def _quotient(w, scale, SOURCE: tl.constexpr):
    """w / scale as far as rounding to an integer sees it, for quotients up to 32 in magnitude.

    Divisions would take most of the kernel's time. A quotient of numbers of 11 bits is half an integer or 2⁻¹³ away
    from it; w · (1 / scale) is off by 2⁻¹⁸ at most, and 14 bits of it put a half back in its place.
    """
    if SOURCE == tl.float32:
        return tl.div_rn(w, scale)
    return (w * tl.div_rn(1.0, scale) + SNAP) - SNAP


@triton.jit
def _pack(w, inside, scale, zero, SOURCE: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Words [GROUPS, WORDS] of weights [GROUPS, WORDS, 8]; code 0 outside."""
    quotient = _quotient(w, scale[:, None, None], SOURCE)
    if SYMMETRIC:  # 7.5 and more only where the scale has hardly any bits; outside the quotient is 0
        nibble = (tl.clamp(quotient, -8.0, 7.0) + (ROUND + 8)).to(tl.int32, bitcast=True)
    else:
        z = zero[:, None, None]
        code = (tl.clamp(quotient, -8.0 - z, 7.0 - z) + ROUND).to(tl.int32, bitcast=True)
        nibble = tl.where(inside, code + (z.to(tl.int32) + 8), 8)
    return tl.sum((nibble & 0xF) << (4 * tl.arange(0, 8))[None, None, :], 2)


@triton.jit
def absmax_kernel(
    w_ptr, packed_ptr, scale_ptr, zero_ptr, bad_ptr,
    rows, columns, width, words, groups,
    SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS groups, neighbours in memory, of CHUNKS chunks of WORDS words."""
    place = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row = place // groups
    first = place % groups * width
    chunk = tl.arange(0, WORDS)
    SCALE: tl.constexpr = scale_ptr.dtype.element_ty
    SOURCE: tl.constexpr = w_ptr.dtype.element_ty

    w, inside = _load(w_ptr, row, first, chunk, width, rows, columns)
    low, high = _range(w, SYMMETRIC)
    bad = _not_a_number_if_bad(w)
    for i in range(1, CHUNKS):
        more, _ = _load(w_ptr, row, first, chunk + i * WORDS, width, rows, columns)
        more_low, more_high = _range(more, SYMMETRIC)
        low, high = tl.minimum(low, more_low), tl.maximum(high, more_high)
        bad += _not_a_number_if_bad(more)
    tl.atomic_max(bad_ptr + tl.zeros_like(row), 1, mask=bad != 0)

    scale, zero = _scale(low, high, SCALE, SMALLEST, SYMMETRIC)
    tl.store(scale_ptr + place, scale.to(SCALE), mask=row < rows)
    if not SYMMETRIC:
        tl.store(zero_ptr + place, zero.to(tl.int8), mask=row < rows)

    for i in range(CHUNKS):
        offset = chunk + i * WORDS
        if i > 0:
            w, inside = _load(w_ptr, row, first, offset, width, rows, columns)
        word = first[:, None] // 8 + offset[None, :]
        packed = _pack(w, inside, scale, zero, SOURCE, SYMMETRIC)
        mask = (row[:, None] < rows) & (offset * 8 < width)[None, :] & (word < words)
        tl.store(packed_ptr + row[:, None].to(tl.int64) * words + word, packed, mask=mask)


def absmax(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """`formats.codec.quantize` of a contiguous `weight` [N, K] (bf16, fp16 or fp32) as one kernel.

    Raises `NonFiniteError` on NaN or infinity.
    """
    quantized, bad = launch(weight, scheme, scale_dtype)
    if bad.item():
        check_finite(weight)
    return quantized


def launch(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, *, tile_words: int = TILE_WORDS, warps: int | None = None
) -> tuple[Quantized, Tensor]:
    """The work of `absmax` without waiting for it, and a flag [1] that will be set if a weight is not finite."""
    rows, columns = weight.shape
    width, groups = scheme.group_width(columns), scheme.groups(columns)
    words = ceil_div(columns, CODES_PER_WORD)
    group_words = triton.next_power_of_2(ceil_div(width, CODES_PER_WORD))
    chunk_words = min(group_words, MAX_CHUNK_WORDS)
    tile_groups = max(1, tile_words // chunk_words)
    packed = weight.new_empty((rows, words), dtype=torch.int32)
    scale = weight.new_empty((rows, groups), dtype=scale_dtype)
    zero = weight.new_empty((rows, groups), dtype=torch.int8)
    bad = weight.new_zeros(1, dtype=torch.int32)
    if columns == groups * width:  # a matrix of whole groups is one with a group a row, and needs no division
        rows, columns, words, groups = rows * groups, width, words // groups, 1
    grid = (ceil_div(rows * groups, tile_groups),)  # one axis: a second ends at 65535
    with torch.cuda.device_of(weight):  # Triton launches on the current GPU, whichever holds the weight
        absmax_kernel[grid](
            weight, packed, scale, zero, bad,
            rows, columns, width, words, groups,
            MIN_SCALE[scale_dtype], scheme.symmetric, tile_groups, chunk_words, ceil_div(group_words, chunk_words),
            num_warps=warps or max(1, tile_groups * chunk_words // (32 * LANE_WORDS)),
        )  # fmt: skip
    return Quantized(packed, scale, None if scheme.symmetric else pack_zero_point(zero)), bad
