"""What the kernels share: the order of tiles, weights as wgmma takes them, sums of split tiles, boxes to copy."""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from runtime.kernels.copies import box_to_shared, reinterpret
from runtime.kernels.fragments import release_successor, shifted_weights_of, wait_for_predecessor, weights_of
from runtime.kernels.launch import Box, Launcher

GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
WORDS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
TOKENS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
TOKEN_BLOCK_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
ROWS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=1)
REDUCE_ROWS, REDUCE_TOKENS = 64, 32


@gluon.jit
def place_of(tile, M, row_tiles, TOKENS: gl.constexpr, RASTER: gl.constexpr):
    """Row tile and token tile of `tile`: RASTER row tiles × all tokens at a time, so that the L2 cache serves both."""
    token_tiles = gl.cdiv(M, TOKENS)
    first = tile // (RASTER * token_tiles) * RASTER
    height = gl.minimum(row_tiles - first, RASTER)
    within = tile % (RASTER * token_tiles)
    return first + within % height, within // height


@gluon.jit
def range_of(column_blocks, split, SPLITS: gl.constexpr, STEP: gl.constexpr):
    """First and last column block of one of SPLITS parts of K, which begin where steps do."""
    units = gl.cdiv(column_blocks, STEP)
    begin, end = units * split // SPLITS, units * (split + 1) // SPLITS
    return begin * STEP, gl.minimum(end * STEP, column_blocks)


@gluon.constexpr_function
def scales_in(step, group):
    """Rows of scales for a step of blocks of 64 columns: one for each stretch that no border of a group cuts."""
    stretch = 64 * step
    while group % stretch:
        stretch //= 2
    return 64 * step // stretch


@gluon.constexpr_function
def tokens_of(box):
    """How many tokens a box [tokens, columns] or [blocks, tokens, 64] has."""
    return box[len(box) - 2]


@gluon.constexpr_function
def token_slots(box, step, buffers):
    """The shape of the boxes of `buffers` steps: one of three dimensions holds all blocks, one of two its columns."""
    return [buffers * (1 if len(box) == 3 else 64 * step // box[1]), *box]


@gluon.jit
def bring_tokens(x_desc, x, slot, barrier, first_token, k, BUFFERS: gl.constexpr):
    """Tokens of the step from column block `k` on → `slot` of x, with zeros beyond the matrix."""
    BOXES: gl.constexpr = x.type.shape[0] // BUFFERS
    if len(x_desc.block_type.shape) == 3:
        box_to_shared(x_desc, [k, first_token, 0], barrier, x.index(slot))
    else:
        for i in gl.static_range(BOXES):
            box = [first_token, k * 64 + i * x_desc.block_type.shape[1]]
            box_to_shared(x_desc, box, barrier, x.index(slot * BOXES + i))


@gluon.constexpr_function
def doublings(first, count):
    """first, 2 · first, 4 · first, … below first · count."""
    return [first << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def words_layout(warps):
    """Words [step, blocks, 4, 32]: a block a warp, four words a lane."""
    return gl.BlockedLayout([1, 1, 1, 4], [1, 1, 4, 8], [1, warps, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def fragment_layout(blocks, step, warps):
    """The same words [blocks, step, g, c, t] as `fragments` draws them."""
    across = [[b, 0, 0, 0, 0] for b in doublings(warps, blocks // warps)]
    along = [[0, b, 0, 0, 0] for b in doublings(1, step)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], *along, *across],
        lane_bases=[[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 0, 4, 0, 0]],
        warp_bases=[[b, 0, 0, 0, 0] for b in doublings(1, warps)], block_bases=[], shape=[blocks, step, 8, 4, 4],
    )  # fmt: skip


@gluon.constexpr_function
def rows_layout(blocks, warps):
    """Values of rows [16 · blocks] beside the words: a lane has rows g and 8 + g of its blocks."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8], *([16 * b] for b in doublings(warps, blocks // warps))],
        lane_bases=[[0], [0], [1], [2], [4]],
        warp_bases=[[16 * b] for b in doublings(1, warps)], block_bases=[], shape=[16 * blocks],
    )  # fmt: skip


@gluon.jit
def of_rows(values, first, part: gl.constexpr, SCALES: gl.constexpr, FRAGMENT: gl.constexpr):
    """Scales or zero points of one block of columns, from index `first` on, for rows g and 8 + g.

    Both are int32 with each value twice, to meet the words [blocks, 1, g, c, t]; a t has its own value if SCALES > 1.
    """
    BLOCKS: gl.constexpr = FRAGMENT.shape[0]
    layout: gl.constexpr = rows_layout(BLOCKS, 1 << len(FRAGMENT.warp_bases))
    if SCALES == 1:
        both = values.index(first).slice(part * 16 * BLOCKS, 16 * BLOCKS).load(layout).to(gl.int32) * 0x10001
        low, high = gl.split(gl.permute(gl.reshape(both, [BLOCKS, 2, 8]), (0, 2, 1)))
        same: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
        low = gl.expand_dims(gl.convert_layout(low, same, assert_trivial=True), 1)
        high = gl.expand_dims(gl.convert_layout(high, same, assert_trivial=True), 1)
        return gl.expand_dims(gl.expand_dims(low, 3), 4), gl.expand_dims(gl.expand_dims(high, 3), 4)
    else:
        four = ()
        for t in gl.static_range(4):
            four += (values.index(first + t * SCALES // 4).slice(part * 16 * BLOCKS, 16 * BLOCKS).load(layout),)
        both = gl.join(gl.join(four[0], four[2]), gl.join(four[1], four[3])).to(gl.int32) * 0x10001
        low, high = gl.split(gl.permute(gl.reshape(both, [BLOCKS, 2, 8, 4]), (0, 2, 3, 1)))
        each: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, FRAGMENT))
        low = gl.expand_dims(gl.convert_layout(low, each, assert_trivial=True), 1)
        high = gl.expand_dims(gl.convert_layout(high, each, assert_trivial=True), 1)
        return gl.expand_dims(low, 3), gl.expand_dims(high, 3)


@gluon.jit
def operand(ring, slot, i: gl.constexpr, part: gl.constexpr, LAYOUT: gl.constexpr, DTYPE: gl.constexpr,
            HAS_ZERO: gl.constexpr, PARTS: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr):  # fmt: skip
    """Weights [ROWS, 64] of one of PARTS of the tile and block `i` of a step, in the registers that wgmma reads."""
    WARPS: gl.constexpr = LAYOUT.parent.warps_per_cta[0]
    BLOCKS: gl.constexpr = ring.words.type.shape[2] // PARTS
    IN_STEP: gl.constexpr = ring.scales.type.shape[0] // BUFFERS
    SCALES: gl.constexpr = max(1, IN_STEP // STEP)
    fragment: gl.constexpr = fragment_layout(BLOCKS, 1, WARPS)
    codes = ring.words.index(slot).slice(i, 1).slice(part * BLOCKS, BLOCKS, dim=1).load(words_layout(WARPS))
    codes = gl.convert_layout(gl.reshape(codes, [BLOCKS, 1, 8, 4, 4]), fragment, assert_trivial=True)
    first = slot * IN_STEP + i * IN_STEP // STEP
    scale, scale_8 = of_rows(ring.scales, first, part, SCALES, fragment)
    if HAS_ZERO:
        zero, zero_8 = of_rows(ring.zeros, first, part, SCALES, fragment)
        weights = shifted_weights_of(codes, scale, scale_8, zero, zero_8, DTYPE)
    else:
        weights = weights_of(codes, scale, scale_8, DTYPE)  # block 1 g c t · neighbour e j
    weights = gl.permute(weights, (0, 6, 1, 2, 4, 7, 3, 5))  # block e 1 g | t j c neighbour
    return gl.convert_layout(gl.reshape(weights, [16 * BLOCKS, 64]), LAYOUT, assert_trivial=True)


@gluon.jit
def multiply_step(
    total, ring, slot, part: gl.constexpr, HAS_ZERO: gl.constexpr, PARTS: gl.constexpr, STEP: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """Add the product of the step in `slot`; each block is unpacked while the tensor cores work on the one before."""
    left: gl.constexpr = gl.DotOperandLayout(0, total.type.layout, 2)
    tokens = reinterpret(ring.x, ring.x.dtype, [BUFFERS * STEP, total.shape[1], 64], TOKEN_BLOCK_LAYOUT)
    unpacked = ()
    for i in gl.static_range(STEP):
        weights = operand(ring, slot, i, part, left, ring.x.dtype, HAS_ZERO, PARTS, STEP, BUFFERS)
        total = warpgroup_mma(weights, tokens.index(slot * STEP + i).permute((1, 0)), total, is_async=True)
        unpacked += (weights,)
    return warpgroup_mma_wait(0, deps=(total,) + unpacked)[0]


@gluon.jit(do_not_specialize=["whole", "M", "eighths"], do_not_specialize_on_alignment=["bias_ptr"])
def reduce_kernel(
    partial_ptr, bias_ptr, y_ptr, whole, M, eighths,
    HAS_BIAS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, SPLITS: gl.constexpr, RASTER: gl.constexpr,
    BLOCK_ROWS: gl.constexpr, BLOCK_TOKENS: gl.constexpr,
):  # fmt: skip
    """Add the SPLITS sums [ROWS, TOKENS] of a tile in their order and write it to y [M, N]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    out: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    release_successor()
    N = eighths * 8  # so that the compiler knows that rows of y start at 16 bytes
    tile = gl.program_id(0)
    row_tile, token_tile = place_of(whole + tile, M, gl.cdiv(N, ROWS), TOKENS, RASTER)
    first_row, first_token = gl.program_id(1) * BLOCK_ROWS, gl.program_id(2) * BLOCK_TOKENS
    row = first_row + gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, layout))
    token = first_token + gl.arange(0, BLOCK_TOKENS, gl.SliceLayout(0, layout))
    at = partial_ptr + tile.to(gl.int64) * (SPLITS * ROWS * TOKENS) + row[:, None] * TOKENS + token[None, :]
    wait_for_predecessor()
    y = gl.load(at)
    for split in gl.static_range(1, SPLITS):
        y += gl.load(at + split * (ROWS * TOKENS))
    y = gl.convert_layout(gl.permute(y, (1, 0)), out)
    row = row_tile * ROWS + first_row + gl.arange(0, BLOCK_ROWS, gl.SliceLayout(0, out))[None, :]
    token = token_tile * TOKENS + first_token + gl.arange(0, BLOCK_TOKENS, gl.SliceLayout(1, out))[:, None]
    if HAS_BIAS:
        y += gl.load(bias_ptr + row, mask=row < N, other=0.0).to(gl.float32)
    gl.store(y_ptr + token.to(gl.int64) * N + row, y.to(y_ptr.dtype.element_ty), mask=(token < M) & (row < N))


launch_reduce = Launcher(reduce_kernel)


def reduce_tiles(
    partial: Tensor, bias: Tensor | None, y: Tensor, tiles: int, whole: int, *,
    rows: int, tokens: int, splits: int, raster: int,
) -> None:  # fmt: skip
    """Finish the last `tiles` tiles of y [M, N], which follow `whole` unsplit ones."""
    block_tokens = min(REDUCE_TOKENS, tokens)
    block_rows = min(REDUCE_ROWS, rows)
    constants = {
        "HAS_BIAS": bias is not None, "ROWS": rows, "TOKENS": tokens, "SPLITS": splits, "RASTER": raster,
        "BLOCK_ROWS": block_rows, "BLOCK_TOKENS": block_tokens,
    }  # fmt: skip
    grid = (tiles, rows // block_rows, tokens // block_tokens)
    args = (partial, y if bias is None else bias, y, whole, y.shape[0], y.shape[1] // 8)
    launch_reduce(grid, y, args, constants, num_warps=4)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def swizzled(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The layout of boxes [rows, columns] that the tensor cores read."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GL_DTYPES[dtype])


def box(matrix: Tensor, rows: int, columns: int) -> Box:
    """For the copy engine: boxes [rows, columns] of a contiguous matrix, swizzled in shared memory."""
    height, width = matrix.shape
    return Box(matrix, (height, width), (width, 1), (rows, columns), swizzled(rows, columns, matrix.dtype))


def tokens_box(x: Tensor, tokens: int, blocks: int) -> Box:
    """For the copy engine: `blocks` blocks of 64 columns of `tokens` tokens, or one block where K ends within one.

    Swizzled boxes have eight rows at least: they may have more tokens than asked for.
    """
    height, width = x.shape
    if width % 64:
        return box(x, max(8, tokens), 64)
    shape, strides = (width // 64, height, 64), (64, width, 1)
    return Box(x, shape, strides, (blocks, tokens if tokens * blocks >= 8 else 8, 64), TOKENS_LAYOUT)


def words_box(words: Tensor, rows: int, blocks: int) -> Box:
    """For the copy engine: `blocks` blocks of columns of `rows` rows."""
    height, width = words.shape[:2]
    shape, strides = (width, height, 4, 32), (128, width * 128, 32, 1)
    return Box(words, shape, strides, (blocks, rows // 16, 4, 32), WORDS_LAYOUT)


def rows_box(values: Tensor, rows: int) -> Box:
    """For the copy engine: the scales or zero points of `rows` rows of a group."""
    extent = (values.shape[0] - 1) * values.stride(0) + values.shape[1]  # a sibling's are a slice of rows
    return Box(values.view(torch.uint16), (extent,), (1,), (rows,), ROWS_LAYOUT)
