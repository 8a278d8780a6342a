"""Triton kernels that quantise in one pass over the weights, bit for bit as the codec and `search` do."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from converter.quantize.kernels.search import searched
from converter.quantize.kernels.tiles import (
    NOT_FINITE,
    absmax_scale,
    for_lanes,
    largest,
    load_words,
    reach,
    store_words,
)
from converter.quantize.search import LANE_WORDS, lanes_of
from formats.codec import MIN_SCALE, Quantized, check_finite
from formats.layout import CODES_PER_WORD, Scheme, ceil_div

TILE_WORDS = 512  # words (of 8 weights) that one program holds in registers
ZERO_WORDS = 128  # words of zero points that one program packs
MAX_CHUNK_WORDS = 1024  # a longer group is walked in chunks, twice; the second time it comes from the cache


@triton.jit(do_not_specialize_on_alignment=["packed_ptr"])  # neighbouring lanes have neighbouring words: leave them so
def quantize_kernel(
    w_ptr, packed_ptr, scale_ptr, zero_ptr, bad_ptr,
    rows, columns, width, words, groups,
    SEARCH: tl.constexpr, SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr,
    GROUPS: tl.constexpr, LANES: tl.constexpr, TURNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS groups, neighbours in memory, of CHUNKS chunks of TURNS · LANES words.

    LANES lanes share a group: each has TURNS words of a chunk, all on their way at once. SEARCH wants a single chunk.
    """
    SCALE: tl.constexpr = scale_ptr.dtype.element_ty
    BOTH: tl.constexpr = SEARCH or not SYMMETRIC  # ends of the range are looked at
    CLAMP: tl.constexpr = BOTH or SCALE == tl.float16  # whose smallest have so few bits that max|w| / scale can be 10
    lane = tl.arange(0, GROUPS * LANES)
    place = tl.program_id(0) * GROUPS + lane // LANES
    row, first, word = place // groups, place % groups * width, lane % LANES

    below = tl.zeros((GROUPS * LANES,), tl.float32)
    above, bad = below, below
    for chunk in range(1, CHUNKS):
        at = word + chunk * (TURNS * LANES)
        tiles = load_words(w_ptr, row, first, at, width, rows, columns, LANES, TURNS, WHOLE)
        below, above, bad = reach(tiles, below, above, bad, BOTH)
    tiles = load_words(w_ptr, row, first, word, width, rows, columns, LANES, TURNS, WHOLE)
    below, above, bad = reach(tiles, below, above, bad, BOTH)
    below, above = largest(below, GROUPS), largest(above + bad, GROUPS)
    bad_groups = above.to(tl.int32, bitcast=True) >= NOT_FINITE
    tl.atomic_max(bad_ptr + tl.zeros((GROUPS,), tl.int32), 1, mask=bad_groups)

    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    if SEARCH:
        count = tl.minimum(width, columns - group % groups * width)
        scale, zero = searched(tiles, below, above, count, GROUPS, SCALE, SMALLEST, SYMMETRIC)
    else:
        scale, zero = absmax_scale(below, above, SCALE, SMALLEST, SYMMETRIC)
    tl.store(scale_ptr + group, scale.to(SCALE), mask=group < rows * groups)
    if not SYMMETRIC:
        tl.store(zero_ptr + group, zero.to(tl.int8), mask=group < rows * groups)

    scale, zero = for_lanes(scale, LANES), for_lanes(zero, LANES)
    store_words(
        packed_ptr, tiles, row, first, word, width, rows, columns, words, scale, zero, LANES, CLAMP, SYMMETRIC, WHOLE
    )
    for chunk in range(1, CHUNKS):
        at = word + chunk * (TURNS * LANES)
        tiles = load_words(w_ptr, row, first, at, width, rows, columns, LANES, TURNS, WHOLE)
        store_words(
            packed_ptr, tiles, row, first, at, width, rows, columns, words, scale, zero, LANES, CLAMP, SYMMETRIC, WHOLE
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
    return _checked(weight, *launch(weight, scheme, scale_dtype))


def search(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """`converter.quantize.search` of a contiguous `weight` [N, K] (bf16, fp16 or fp32) as one kernel.

    Raises `NonFiniteError` on NaN or infinity.
    """
    return _checked(weight, *launch(weight, scheme, scale_dtype, search=True))


def _checked(weight: Tensor, quantized: Quantized, bad: Tensor) -> Quantized:
    if bad.item():
        check_finite(weight)
    return quantized


def launch(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    *,
    search: bool = False,
    tile_words: int = TILE_WORDS,
    warps: int | None = None,
) -> tuple[Quantized, Tensor]:
    """The work of `absmax` or `search` without waiting for it, and a flag [1] set if a weight is not finite."""
    rows, columns = weight.shape
    width, groups = scheme.group_width(columns), scheme.groups(columns)
    words = ceil_div(columns, CODES_PER_WORD)
    group_words = triton.next_power_of_2(ceil_div(width, CODES_PER_WORD))
    chunk_words = group_words if search else min(group_words, MAX_CHUNK_WORDS)
    lanes = lanes_of(chunk_words)
    tile_groups = max(1, tile_words // chunk_words)
    packed = weight.new_empty((rows, words), dtype=torch.int32)
    scale = weight.new_empty((rows, groups), dtype=scale_dtype)
    zero = weight.new_empty((rows, groups), dtype=torch.int8)
    bad = weight.new_zeros(1, dtype=torch.int32)
    if columns == groups * width:  # a matrix of whole groups is one with a group a row, and needs no division
        rows, columns, words, groups = rows * groups, width, words // groups, 1
    grid = (ceil_div(rows * groups, tile_groups),)  # one axis: a second ends at 65535
    with torch.cuda.device_of(weight):  # Triton launches on the current GPU, whichever holds the weight
        quantize_kernel[grid](
            weight, packed, scale, zero, bad,
            rows, columns, width, words, groups,
            search, MIN_SCALE[scale_dtype], scheme.symmetric, columns % CODES_PER_WORD == 0,
            tile_groups, lanes, chunk_words // lanes, ceil_div(group_words, chunk_words),
            num_warps=warps or max(1, tile_groups * chunk_words // (32 * LANE_WORDS)), enable_fp_fusion=not search,
        )  # fmt: skip
        if scheme.symmetric:
            return Quantized(packed, scale, None), bad
        zero_words = weight.new_empty((ceil_div(zero.shape[0], CODES_PER_WORD), zero.shape[1]), dtype=torch.int32)
        zero_point_kernel[(ceil_div(zero_words.numel(), ZERO_WORDS),)](zero, zero_words, *zero.shape, ZERO_WORDS)
    return Quantized(packed, scale, zero_words), bad
