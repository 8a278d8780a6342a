"""What the wgmma kernels share: the order of tiles, a step's way to shared memory and registers, sums of split tiles.

A step is STEP blocks of 64 columns. The copy engine brings its words, scales and tokens into a slot of a ring and
counts the bytes on the slot's barrier. With SCALES groups in a step, and tiles of PARTS · ROWS rows:

    words           [BUFFERS · PARTS · STEP, ROWS / 16, 4, 32] int32     in kernel order, see `fragments`
    scales, zeros   [BUFFERS · SCALES, PARTS · ROWS] 16 bits
    tokens          [BUFFERS · STEP, TOKENS, 64]

In fp8 one box holds all blocks of a step.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from runtime.kernels.copies import box_to_shared
from runtime.kernels.fragments import release_successor, shifted_weights_of, wait_for_predecessor, weights_of
from runtime.kernels.launch import Box, Launcher

GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
WORDS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
ROWS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=1)
REDUCE_ROWS, REDUCE_TOKENS = 64, 32


class Ring(NamedTuple):
    """Where the steps come from, and their slots in shared memory with the barriers that count their bytes."""

    x_desc: Any
    words_desc: Any
    scale_desc: Any
    zero_desc: Any
    x: Any
    words: Any
    scales: Any
    zeros: Any
    ready: Any


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


@gluon.jit
def ready_and_free(BUFFERS: gl.constexpr):
    """The barriers of a ring with two consumers: a slot is ready by the bytes that came, free when both have left."""
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    return ready, free


@gluon.jit
def expect_step(ring, slot, HAS_ZERO: gl.constexpr, BUFFERS: gl.constexpr):
    """Tell the barrier of `slot` how many bytes a step has."""
    BYTES: gl.constexpr = (
        ring.x.type.shape[0] // BUFFERS * ring.x_desc.block_type.nbytes
        + ring.words.type.shape[0] // BUFFERS * ring.words_desc.block_type.nbytes
        + ring.scales.type.shape[0] // BUFFERS * ring.scale_desc.block_type.nbytes * (2 if HAS_ZERO else 1)
    )
    mbarrier.expect(ring.ready.index(slot), BYTES)


@gluon.jit
def bring_weights(
    ring,
    slot,
    row_tile,
    k,
    stride,
    GROUP: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    STEP: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Words, scales and zero points of the step from column block `k` on → `slot` of the ring."""
    BLOCKS: gl.constexpr = ring.words_desc.block_type.shape[0]
    BOXES: gl.constexpr = 4 * STEP // ring.words_desc.block_type.shape[1]
    PARTS: gl.constexpr = ring.words.type.shape[0] // (BUFFERS * BOXES)
    SCALES: gl.constexpr = ring.scales.type.shape[0] // BUFFERS
    barrier = ring.ready.index(slot)
    for part in gl.static_range(PARTS):
        for i in gl.static_range(BOXES):
            box = [(row_tile * PARTS + part) * BLOCKS, k * 4 + i * (4 * STEP // BOXES), 0]
            box_to_shared(ring.words_desc, box, barrier, ring.words.index((slot * PARTS + part) * BOXES + i))
    for i in gl.static_range(SCALES):
        first = (k * 64 + i * (64 * STEP // SCALES)) // GROUP * stride + row_tile * (16 * BLOCKS * PARTS)
        box_to_shared(ring.scale_desc, [first], barrier, ring.scales.index(slot * SCALES + i))
        if HAS_ZERO:
            box_to_shared(ring.zero_desc, [first], barrier, ring.zeros.index(slot * SCALES + i))


@gluon.jit
def bring_tokens(ring, slot, first_token, k, end, column_blocks, BUFFERS: gl.constexpr):
    """Tokens of the step from column block `k` on → `slot`; from block `end` on zeros, from beyond the matrix."""
    BOXES: gl.constexpr = ring.x.type.shape[0] // BUFFERS
    for i in gl.static_range(BOXES):
        block = k + i * (ring.x_desc.block_type.shape[1] // 64)
        block = gl.where(block < end, block, column_blocks)
        box_to_shared(ring.x_desc, [first_token, block * 64], ring.ready.index(slot), ring.x.index(slot * BOXES + i))


@gluon.jit
def bring_step(
    ring, slot, row_tile, first_token, k, end, stride, column_blocks,
    GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """All of the step from column block `k` on → `slot`."""
    expect_step(ring, slot, HAS_ZERO, BUFFERS)
    bring_weights(ring, slot, row_tile, k, stride, GROUP, HAS_ZERO, STEP, BUFFERS)
    bring_tokens(ring, slot, first_token, k, end, column_blocks, BUFFERS)


@gluon.jit
def bring_first_steps(
    ring, row_tile, first_token, begin, end, stride, column_blocks,
    GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Fill the ring, with tokens once the kernel before has ended: weights do not wait for it; how many steps."""
    ahead = gl.minimum(gl.cdiv(end - begin, STEP), BUFFERS)
    for step in range(ahead):
        expect_step(ring, step, HAS_ZERO, BUFFERS)
        bring_weights(ring, step, row_tile, begin + step * STEP, stride, GROUP, HAS_ZERO, STEP, BUFFERS)
    wait_for_predecessor()
    for step in range(ahead):
        bring_tokens(ring, step, first_token, begin + step * STEP, end, column_blocks, BUFFERS)
    return ahead


class Order(NamedTuple):
    """What there is to do: `whole` tiles and then, to `items`, the parts of split ones."""

    M: Any
    N: Any
    stride: Any  # between the scales of two groups
    column_blocks: Any
    whole: Any
    items: Any


@gluon.jit
def task_of(
    order,
    item,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SPLITS: gl.constexpr,
    RASTER: gl.constexpr,
    STEP: gl.constexpr,
):
    """Number of the part (negative for a whole tile), row tile, first token, first and last column block of an item."""
    part = item - order.whole
    split = part >= 0
    tile = gl.where(split, order.whole + part // SPLITS, item)
    row_tile, token_tile = place_of(tile, order.M, gl.cdiv(order.N, ROWS), TOKENS, RASTER)
    begin, end = range_of(order.column_blocks, gl.maximum(part, 0) % SPLITS, SPLITS, STEP)
    begin, end = gl.where(split, begin, 0), gl.where(split, end, order.column_blocks)
    return part, row_tile, token_tile * TOKENS, begin, end


@gluon.jit
def produce(
    order, ring, free, ROWS: gl.constexpr, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, SPLITS: gl.constexpr,
    RASTER: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Bring every step of every item of this program as soon as the consumers have left its slot of the ring."""
    TOKENS: gl.constexpr = ring.x_desc.block_type.shape[0]
    stride, column_blocks = order.stride, order.column_blocks
    _, row_tile, first_token, begin, end = task_of(order, gl.program_id(0), ROWS, TOKENS, SPLITS, RASTER, STEP)
    ahead = bring_first_steps(
        ring, row_tile, first_token, begin, end, stride, column_blocks, GROUP, HAS_ZERO, STEP, BUFFERS
    )
    count = ahead
    for item in range(gl.program_id(0), order.items, gl.num_programs(0)):
        _, row_tile, first_token, begin, end = task_of(order, item, ROWS, TOKENS, SPLITS, RASTER, STEP)
        done = gl.where(item == gl.program_id(0), ahead, 0)
        for step in range(done, gl.cdiv(end - begin, STEP)):
            slot = count % BUFFERS
            mbarrier.wait(free.index(slot), (count // BUFFERS & 1) ^ 1)
            k = begin + step * STEP
            bring_step(ring, slot, row_tile, first_token, k, end, stride, column_blocks, GROUP, HAS_ZERO, STEP, BUFFERS)
            count += 1


@gluon.constexpr_function
def doublings(first, count):
    """first, 2 · first, 4 · first, … below first · count."""
    return [first << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def words_layout(warps):
    """Words [blocks, 4 · step, 32]: a block a warp, four words a lane."""
    return gl.BlockedLayout([1, 1, 4], [1, 4, 8], [warps, 1, 1], [2, 1, 0])


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
            HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr):  # fmt: skip
    """Weights [ROWS, 64] of one part of the tile and block `i` of a step, in the registers where wgmma reads them."""
    BLOCKS: gl.constexpr = ring.words.type.shape[1]
    PARTS: gl.constexpr = ring.words.type.shape[0] // (BUFFERS * STEP)
    IN_STEP: gl.constexpr = ring.scales.type.shape[0] // BUFFERS
    SCALES: gl.constexpr = max(1, IN_STEP // STEP)
    WARPS: gl.constexpr = LAYOUT.parent.warps_per_cta[0]
    fragment: gl.constexpr = fragment_layout(BLOCKS, 1, WARPS)
    codes = ring.words.index((slot * PARTS + part) * STEP + i).load(words_layout(WARPS))
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
    total, ring, slot, part: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr
):
    """Add the product of the step in `slot`; each block is unpacked while the tensor cores work on the one before."""
    left: gl.constexpr = gl.DotOperandLayout(0, total.type.layout, 2)
    unpacked = ()
    for i in gl.static_range(STEP):
        weights = operand(ring, slot, i, part, left, ring.x.dtype, HAS_ZERO, STEP, BUFFERS)
        total = warpgroup_mma(weights, ring.x.index(slot * STEP + i).permute((1, 0)), total, is_async=True)
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


def words_box(words: Tensor, rows: int, blocks: int = 1) -> Box:
    """For the copy engine: `rows` rows of `blocks` blocks of columns."""
    height, width = words.shape[0], words.shape[1] * 4
    return Box(words, (height, width, 32), (width * 32, 32, 1), (rows // 16, 4 * blocks, 32), WORDS_LAYOUT)


def rows_box(values: Tensor, rows: int) -> Box:
    """For the copy engine: the scales or zero points of `rows` rows of a group."""
    extent = (values.shape[0] - 1) * values.stride(0) + values.shape[1]  # a sibling's are a slice of rows
    return Box(values.view(torch.uint16), (extent,), (1,), (rows,), ROWS_LAYOUT)
