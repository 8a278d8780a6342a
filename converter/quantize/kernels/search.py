"""The search of `converter.quantize.search` for the groups of a program, whose weights stay in registers all the while.

Operation by operation as there, with sums in the order of `search.summer`; so it has to be compiled without
contracting products and sums (`enable_fp_fusion=False`).
"""

import triton
import triton.language as tl

from converter.quantize.kernels.tiles import ROUND, absmax_scale, as_stored, for_lanes
from converter.quantize.search import COARSE, FINE

COARSE_FIRST, COARSE_STEP, COARSE_COUNT = map(tl.constexpr, (COARSE.start, COARSE.step, len(COARSE)))
FINE_FIRST, FINE_COUNT = map(tl.constexpr, (FINE.start, len(FINE)))


@triton.jit
def halved(x):
    """x [A, B] → [A, B/2]: the first half of each row added to the second."""
    first, second = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    return first + second


@triton.jit
def total(x, GROUPS: tl.constexpr):
    """Sums [GROUPS] of x [LANES, 8]: by halves, first of the eight, then of the lanes of a group, 1024 at most.

    Step by step, because the order of tl.sum depends on the layout that the compiler has chosen.
    """
    x = halved(halved(halved(x)))
    x = tl.reshape(x, (GROUPS, x.shape[0] // GROUPS))
    for _ in tl.static_range(10):
        if x.shape[1] > 1:
            x = halved(x)
    return tl.reshape(x, (GROUPS,))


@triton.jit
def levels(w, inverse, zero):
    """Codes less the zero point [LANES, 8]."""
    return (tl.clamp(w * inverse, -8.0 - zero, 7.0 - zero) + ROUND) - ROUND


@triton.jit
def stored(x, SCALE: tl.constexpr, SMALLEST: tl.constexpr):
    """Scales of either sign as `formats.codec.as_stored` has them, in fp32."""
    magnitude = tl.maximum(as_stored(tl.abs(x), SCALE), SMALLEST)
    return tl.where(x == 0.0, 1.0, tl.where(x < 0.0, -magnitude, magnitude))


@triton.jit
def error(tiles, sigma, scale, zero, GROUPS: tl.constexpr):
    """Σ (σ + |w|) · (w − ŵ)² of each group [GROUPS]."""
    LANES: tl.constexpr = tiles[0].shape[0]
    EACH: tl.constexpr = LANES // GROUPS
    inverse = for_lanes(tl.div_rn(1.0, scale), EACH)[:, None]
    scale, zero = for_lanes(scale, EACH)[:, None], for_lanes(zero, EACH)[:, None]
    sums = tl.zeros((LANES, 8), tl.float32)
    for turn in tl.static_range(len(tiles)):
        w = tiles[turn].to(tl.float32)
        difference = levels(w, inverse, zero) * scale - w
        sums += difference * difference * (sigma + tl.abs(w))
    return total(sums, GROUPS)


@triton.jit
def fitted(tiles, sigma, scale, zero, GROUPS: tl.constexpr):
    """The scales of least squares for the codes that `scale` gives [GROUPS]; infinity or NaN where there are none."""
    LANES: tl.constexpr = tiles[0].shape[0]
    EACH: tl.constexpr = LANES // GROUPS
    inverse, shift = for_lanes(tl.div_rn(1.0, scale), EACH)[:, None], for_lanes(zero, EACH)[:, None]
    above = tl.zeros((LANES, 8), tl.float32)
    below = above
    for turn in tl.static_range(len(tiles)):
        w = tiles[turn].to(tl.float32)
        code = levels(w, inverse, shift)
        weighted = (sigma + tl.abs(w)) * code
        above += weighted * w
        below += weighted * code
    return tl.div_rn(total(above, GROUPS), total(below, GROUPS))


@triton.jit
def searched(tiles, below, above, count, GROUPS: tl.constexpr, SCALE: tl.constexpr, SMALLEST: tl.constexpr,
             SYMMETRIC: tl.constexpr):  # fmt: skip
    """Scales as stored (in fp32) and zero points of groups of `count` weights, from those and their reach [GROUPS]."""
    EACH: tl.constexpr = tiles[0].shape[0] // GROUPS
    squares = tl.zeros(tiles[0].shape, tl.float32)
    for turn in tl.static_range(len(tiles)):
        w = tiles[turn].to(tl.float32)
        squares += w * w
    sigma = for_lanes(tl.sqrt_rn(tl.div_rn(total(squares, GROUPS), count.to(tl.float32))), EACH)[:, None]

    ROUNDS: tl.constexpr = 2 if SYMMETRIC else 3
    if SYMMETRIC:
        base = tl.where(above >= below, above, -below) * (-0.125)
        base_zero = tl.zeros_like(base)
    else:
        base, base_zero = absmax_scale(below, above, SCALE, SMALLEST, False)
    best, best_zero = stored(base, SCALE, SMALLEST), base_zero
    least = error(tiles, sigma, best, best_zero, GROUPS)
    origin = tl.zeros((GROUPS,), tl.int32)
    for number in range(ROUNDS * COARSE_COUNT):
        i = origin + number
        sweep = i // COARSE_COUNT
        ratio = (i % COARSE_COUNT * COARSE_STEP + COARSE_FIRST).to(tl.float32) * (1 / 64)
        if SYMMETRIC:
            scale, zero = stored(base * (ratio * (1 - 2 * sweep).to(tl.float32)), SCALE, SMALLEST), base_zero
        else:  # the zero point itself, one less, one more
            shift = (sweep * (3 * sweep - 5) // 2).to(tl.float32)
            scale, zero = stored(base * ratio, SCALE, SMALLEST), tl.clamp(base_zero + shift, -8.0, 7.0)
        found = error(tiles, sigma, scale, zero, GROUPS)
        better = found < least
        best, best_zero = tl.where(better, scale, best), tl.where(better, zero, best_zero)
        least = tl.where(better, found, least)
    near = best
    for number in range(FINE_COUNT):
        start = near * ((origin + number + FINE_FIRST).to(tl.float32) * (1 / 128))
        exact = fitted(tiles, sigma, start, best_zero, GROUPS)
        usable = (exact != 0.0) & (tl.abs(exact) < float("inf"))
        scale = stored(tl.where(usable, exact, near), SCALE, SMALLEST)
        found = error(tiles, sigma, scale, best_zero, GROUPS)
        best, least = tl.where(found < least, scale, best), tl.minimum(found, least)
    return best, best_zero
