"""Triton kernels that quantise in one pass over the weights, bit for bit as the codec does."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from formats.codec import MIN_SCALE, Quantized, check_finite
from formats.layout import CODES_PER_WORD, Scheme, ceil_div

TILE_WORDS = 512  # words (of 8 weights) that one program holds in registers
LANE_WORDS = 8  # of them for each lane of a warp
GROUP_LANES = 4  # lanes that share a group at least: 64 bytes of 16-bit weights, side by side
ZERO_WORDS = 128  # words of zero points that one program packs
MAX_CHUNK_WORDS = 1024  # a longer group is walked in chunks, twice; the second time it comes from the cache

ROUND = tl.constexpr(1.5 * 2.0**23)  # what is added to a number < 2²² leaves no bits for a fraction: half to even
ROUND_BITS = tl.constexpr(0x4B400000)  # its bits; those of ROUND + n are n more
SNAP = tl.constexpr(1.5 * 2.0**9)  # leaves 14 bits of a fraction
NOT_FINITE = tl.constexpr(0x7F800000)  # bits of infinity; those of a NaN are more, those of any number are fewer


@triton.jit
def _inside(row, first, word, width, rows, columns, WHOLE: tl.constexpr):
    """Columns of the weights of `word` of each group, a lane each [LANES], as [LANES, 8]; and whether they exist."""
    eighth = tl.arange(0, 8)[None, :]
    in_group = word[:, None] * 8 + (0 if WHOLE else eighth)  # if WHOLE, no word is cut off: a mask for all of it
    column = first[:, None] + in_group
    inside = (row[:, None] < rows) & (in_group < width) & (column < columns)
    return first[:, None] + word[:, None] * 8 + eighth, inside


@triton.jit
def _load(w_ptr, row, first, word, width, rows, columns, STRIDE: tl.constexpr, TURNS: tl.constexpr,
          WHOLE: tl.constexpr):  # fmt: skip
    """TURNS words of each lane, STRIDE from one to the next, as weights [LANES, 8]; 0 outside."""
    tiles = ()
    for turn in tl.static_range(TURNS):
        column, inside = _inside(row, first, word + turn * STRIDE, width, rows, columns, WHOLE)
        tiles += (tl.load(w_ptr + (row[:, None].to(tl.int64) * columns + column), mask=inside, other=0.0),)
    return tiles


@triton.jit
def _reach(tiles, below, above, bad, SYMMETRIC: tl.constexpr):
    """How far the weights of each lane, and those before, reach below and above 0 [LANES].

    And 0, or NaN if one of them is not finite: looked for apart, because tl.max passes over NaN.
    """
    for turn in tl.static_range(len(tiles)):
        w = tiles[turn].to(tl.float32)
        if SYMMETRIC:
            above = tl.maximum(above, tl.max(tl.abs(w), 1))
        else:
            above = tl.maximum(above, tl.max(w, 1))
            below = tl.maximum(below, -tl.min(w, 1))
        bad += tl.sum(w * 0.0, 1)
    return below, above, bad


@triton.jit
def _largest(x, GROUPS: tl.constexpr):
    """Largest of each group's lanes, for each of them [LANES]; none is below 0, and NaN is the largest of all.

    By their bits, whose order as integers is that of numbers, infinity and NaN.
    """
    EACH: tl.constexpr = x.shape[0] // GROUPS
    bits = tl.reshape(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (GROUPS, EACH))
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def _for_lanes(x, EACH: tl.constexpr):
    """Values of groups [GROUPS] for each of their lanes [GROUPS · EACH]."""
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], EACH)), (x.shape[0] * EACH,))


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
def _scale(below, above, SCALE: tl.constexpr, SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale as stored (in fp32) and zero point of each group, from the reach of its weights."""
    if SYMMETRIC:
        exact = tl.div_rn(above, 7.0)
    else:
        exact = tl.div_rn(above, 15.0) + tl.div_rn(below, 15.0)
    scale = tl.maximum(_as_stored(exact, SCALE), SMALLEST)
    scale = tl.where(exact == 0.0, 1.0, scale)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = (tl.clamp(tl.div_rn(below, scale) - 8.0, -8.0, 7.0) + ROUND) - ROUND
    return scale, zero


@triton.jit
def _pack(w, inside, scale, zero, SCALE: tl.constexpr, SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr):
    """Words [LANES] of weights [LANES, 8]; code 0 outside.

    Divisions would take most of the kernel's time. A quotient of numbers of 11 bits is half an integer or 2⁻¹³ away
    from it; w · (1 / scale) is off by 2⁻¹⁶ at most, and 14 bits of it put a half back in its place.
    """
    offset = (zero.to(tl.int32) + (8 - ROUND_BITS)) * 0x11111111  # to turn the bits below into nibbles, a word at once
    scale, zero = scale[:, None], zero[:, None]
    START: tl.constexpr = 0.0 if w.dtype == tl.float32 else SNAP
    quotient = tl.div_rn(w, scale) if w.dtype == tl.float32 else w.to(tl.float32) * (1.0 / scale) + START
    if not SYMMETRIC:
        quotient = tl.clamp(quotient, START - 8.0 - zero, START + 7.0 - zero)
    elif SCALE == tl.float16:  # whose smallest have so few bits that max|w| / scale can be 10
        quotient = tl.clamp(quotient, START - 8.0, START + 7.0)
    bits = (quotient + (ROUND - START)).to(tl.int32, bitcast=True)
    if not (SYMMETRIC or WHOLE):
        bits = tl.where(inside, bits, ROUND_BITS - zero.to(tl.int32))
    return tl.sum(bits << (4 * tl.arange(0, 8))[None, :], 1) + offset


@triton.jit
def _store(packed_ptr, tiles, row, first, word, width, rows, columns, words, scale, zero, STRIDE: tl.constexpr,
           SCALE: tl.constexpr, SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The words that `_load` brought."""
    for turn in tl.static_range(len(tiles)):
        own = word + turn * STRIDE
        _, inside = _inside(row, first, own, width, rows, columns, WHOLE)
        packed = _pack(tiles[turn], inside, scale, zero, SCALE, SYMMETRIC, WHOLE)
        target = first // 8 + own
        mask = (row < rows) & (own * 8 < width) & (target < words)
        tl.store(packed_ptr + (row.to(tl.int64) * words + target), packed, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["packed_ptr"])  # neighbouring lanes have neighbouring words: leave them so
def absmax_kernel(
    w_ptr, packed_ptr, scale_ptr, zero_ptr, bad_ptr,
    rows, columns, width, words, groups,
    SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr,
    GROUPS: tl.constexpr, LANES: tl.constexpr, TURNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS groups, neighbours in memory, of CHUNKS chunks of TURNS · LANES words.

    LANES lanes share a group: each has TURNS words of a chunk, all on their way at once.
    """
    SCALE: tl.constexpr = scale_ptr.dtype.element_ty
    lane = tl.arange(0, GROUPS * LANES)
    place = tl.program_id(0) * GROUPS + lane // LANES
    row, first, word = place // groups, place % groups * width, lane % LANES

    below = tl.zeros((GROUPS * LANES,), tl.float32)
    above, bad = below, below
    for chunk in range(1, CHUNKS):
        at = word + chunk * (TURNS * LANES)
        tiles = _load(w_ptr, row, first, at, width, rows, columns, LANES, TURNS, WHOLE)
        below, above, bad = _reach(tiles, below, above, bad, SYMMETRIC)
    tiles = _load(w_ptr, row, first, word, width, rows, columns, LANES, TURNS, WHOLE)
    below, above, bad = _reach(tiles, below, above, bad, SYMMETRIC)
    below, above = _largest(below, GROUPS), _largest(above + bad, GROUPS)
    bad_groups = above.to(tl.int32, bitcast=True) >= NOT_FINITE
    tl.atomic_max(bad_ptr + tl.zeros((GROUPS,), tl.int32), 1, mask=bad_groups)

    scale, zero = _scale(below, above, SCALE, SMALLEST, SYMMETRIC)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    tl.store(scale_ptr + group, scale.to(SCALE), mask=group < rows * groups)
    if not SYMMETRIC:
        tl.store(zero_ptr + group, zero.to(tl.int8), mask=group < rows * groups)

    scale, zero = _for_lanes(scale, LANES), _for_lanes(zero, LANES)
    _store(
        packed_ptr, tiles, row, first, word, width, rows, columns, words, scale, zero, LANES, SCALE, SYMMETRIC, WHOLE
    )
    for chunk in range(1, CHUNKS):
        at = word + chunk * (TURNS * LANES)
        tiles = _load(w_ptr, row, first, at, width, rows, columns, LANES, TURNS, WHOLE)
        _store(
            packed_ptr, tiles, row, first, at, width, rows, columns, words, scale, zero, LANES, SCALE, SYMMETRIC, WHOLE
        )


@triton.jit
def zero_point_kernel(zero_ptr, packed_ptr, rows, groups, BLOCK: tl.constexpr):
    """`formats.codec.pack_zero_point`: int8 [rows, groups] → words [ceil(rows/8), groups]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = place[:, None] // groups * 8 + tl.arange(0, 8)[None, :]
    zero = tl.load(zero_ptr + (row.to(tl.int64) * groups + place[:, None] % groups), mask=row < rows, other=0)
    word = tl.sum((zero.to(tl.int32) + 8) << (4 * tl.arange(0, 8))[None, :], 1)
    tl.store(packed_ptr + place, word, mask=place < tl.cdiv(rows, 8) * groups)


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
    lanes = max(min(group_words, GROUP_LANES), chunk_words // LANE_WORDS)
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
            MIN_SCALE[scale_dtype], scheme.symmetric, columns % CODES_PER_WORD == 0,
            tile_groups, lanes, chunk_words // lanes, ceil_div(group_words, chunk_words),
            num_warps=warps or max(1, tile_groups * chunk_words // (32 * LANE_WORDS)),
        )  # fmt: skip
        if scheme.symmetric:
            return Quantized(packed, scale, None), bad
        zero_words = weight.new_empty((ceil_div(zero.shape[0], CODES_PER_WORD), zero.shape[1]), dtype=torch.int32)
        zero_point_kernel[(ceil_div(zero_words.numel(), ZERO_WORDS),)](zero, zero_words, *zero.shape, ZERO_WORDS)
    return Quantized(packed, scale, zero_words), bad
