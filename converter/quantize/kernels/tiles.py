"""What the Triton kernels of the converter share: words of weights in and out, ranges, scales as they are stored.

A lane has 8 weights of each of its words, which are TURNS of a group's: [LANES, 8] a turn, LANES being those of all the
program's groups. Values of groups are [GROUPS], or [LANES] with each as often as its group has lanes.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(1.5 * 2.0**23)  # what is added to a number < 2²² leaves no bits for a fraction: half to even
ROUND_BITS = tl.constexpr(0x4B400000)  # its bits; those of ROUND + n are n more
SNAP = tl.constexpr(1.5 * 2.0**9)  # leaves 14 bits of a fraction
NOT_FINITE = tl.constexpr(0x7F800000)  # bits of infinity; those of a NaN are more, those of any number are fewer


@triton.jit
def inside_of(row, first, word, width, rows, columns, WHOLE: tl.constexpr):
    """Columns of the weights of `word` of each group, a lane each [LANES], as [LANES, 8]; and whether they exist."""
    eighth = tl.arange(0, 8)[None, :]
    in_group = word[:, None] * 8 + (0 if WHOLE else eighth)  # if WHOLE, no word is cut off: a mask for all of it
    column = first[:, None] + in_group
    inside = (row[:, None] < rows) & (in_group < width) & (column < columns)
    return first[:, None] + word[:, None] * 8 + eighth, inside


@triton.jit
def load_words(w_ptr, row, first, word, width, rows, columns, STRIDE: tl.constexpr, TURNS: tl.constexpr,
               WHOLE: tl.constexpr):  # fmt: skip
    """TURNS words of each lane, STRIDE from one to the next, as weights [LANES, 8]; 0 outside."""
    tiles = ()
    for turn in tl.static_range(TURNS):
        column, inside = inside_of(row, first, word + turn * STRIDE, width, rows, columns, WHOLE)
        tiles += (tl.load(w_ptr + (row[:, None].to(tl.int64) * columns + column), mask=inside, other=0.0),)
    return tiles


@triton.jit
def reach(tiles, below, above, bad, BOTH: tl.constexpr):
    """How far the weights of each lane, and those before, reach below and above 0 [LANES]; unless BOTH as far above.

    And 0, or NaN if one of them is not finite: looked for apart, because tl.max passes over NaN.
    """
    for turn in tl.static_range(len(tiles)):
        w = tiles[turn].to(tl.float32)
        if tiles[turn].dtype == tl.float32:
            w += 0.0  # Triton 3.6 cannot compile, in a loop, the largest and the smallest of what a load gives
        if BOTH:
            above = tl.maximum(above, tl.max(w, 1))
            below = tl.maximum(below, -tl.min(w, 1))
        else:
            above = tl.maximum(above, tl.max(tl.abs(w), 1))
        bad += tl.sum(w * 0.0, 1)
    return below, above, bad


@triton.jit
def largest(x, GROUPS: tl.constexpr):
    """Largest of each group's lanes [GROUPS]; none is below 0, and NaN is the largest of all.

    By their bits, whose order as integers is that of numbers, infinity and NaN.
    """
    EACH: tl.constexpr = x.shape[0] // GROUPS
    bits = tl.reshape(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (GROUPS, EACH))
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def for_lanes(x, EACH: tl.constexpr):
    """Values of groups [GROUPS] for each of their lanes [GROUPS · EACH]."""
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], EACH)), (x.shape[0] * EACH,))


@triton.jit
def as_stored(x, SCALE: tl.constexpr):
    """fp32 → the nearest value of SCALE, half to even, as fp32."""
    if SCALE == tl.bfloat16:
        # In integers, because Triton's interpreter cuts bf16 off instead of rounding it.
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(SCALE).to(tl.float32)


@triton.jit
def absmax_scale(below, above, SCALE: tl.constexpr, SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale as stored (in fp32) and zero point of each group, from the reach of its weights."""
    if SYMMETRIC:
        exact = tl.div_rn(above, 7.0)
    else:
        exact = tl.div_rn(above, 15.0) + tl.div_rn(below, 15.0)
    scale = tl.maximum(as_stored(exact, SCALE), SMALLEST)
    scale = tl.where(exact == 0.0, 1.0, scale)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = (tl.clamp(tl.div_rn(below, scale) - 8.0, -8.0, 7.0) + ROUND) - ROUND
    return scale, zero


@triton.jit
def pack(w, inside, scale, zero, CLAMP: tl.constexpr, SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr):
    """Words [LANES] of weights [LANES, 8]; code 0 outside. CLAMP: quotients reach beyond the codes.

    Divisions would take most of the kernel's time. A quotient of numbers of 11 bits is half an integer or 2⁻¹³ away
    from it; w · (1 / scale) is off by 2⁻¹⁶ at most, and 14 bits of it put a half back in its place.
    """
    offset = (zero.to(tl.int32) + (8 - ROUND_BITS)) * 0x11111111  # to turn the bits below into nibbles, a word at once
    scale, zero = scale[:, None], zero[:, None]
    START: tl.constexpr = 0.0 if w.dtype == tl.float32 else SNAP
    quotient = tl.div_rn(w, scale) if w.dtype == tl.float32 else w.to(tl.float32) * (1.0 / scale) + START
    if CLAMP:
        quotient = tl.clamp(quotient, START - 8.0 - zero, START + 7.0 - zero)
    bits = (quotient + (ROUND - START)).to(tl.int32, bitcast=True)
    if not (SYMMETRIC or WHOLE):
        bits = tl.where(inside, bits, ROUND_BITS - zero.to(tl.int32))
    return tl.sum(bits << (4 * tl.arange(0, 8))[None, :], 1) + offset


@triton.jit
def store_words(packed_ptr, tiles, row, first, word, width, rows, columns, words, scale, zero, STRIDE: tl.constexpr,
                CLAMP: tl.constexpr, SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The words that `load_words` brought."""
    for turn in tl.static_range(len(tiles)):
        own = word + turn * STRIDE
        _, inside = inside_of(row, first, own, width, rows, columns, WHOLE)
        packed = pack(tiles[turn], inside, scale, zero, CLAMP, SYMMETRIC, WHOLE)
        target = first // 8 + own
        mask = (row < rows) & (own * 8 < width) & (target < words)
        tl.store(packed_ptr + (row.to(tl.int64) * words + target), packed, mask=mask)
