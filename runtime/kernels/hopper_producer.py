"""A producer: one warp that has the copy engine bring every step of a program's tiles, for the consumers beside it.

A step is STEP blocks of 64 columns. Its words, scales and tokens come to a slot of a ring in shared memory, and the
slot's barrier counts their bytes; with SCALES groups in a step::

    words           [BUFFERS, STEP, tile rows / 16, 4, 32] int32     in kernel order, see `fragments`
    scales, zeros   [BUFFERS · SCALES, tile rows] 16 bits
    tokens          [BUFFERS, STEP, TOKENS, 64]
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from runtime.kernels.copies import box_to_shared
from runtime.kernels.fragments import wait_for_predecessor
from runtime.kernels.hopper_tiles import bring_tokens, place_of, range_of, tokens_of


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
def ready_and_free(BUFFERS: gl.constexpr):
    """The barriers of a ring with two consumers: a slot is ready with all that comes, free when both have left."""
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
        + ring.words_desc.block_type.nbytes
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
    ROWS: gl.constexpr = 16 * ring.words_desc.block_type.shape[1]
    SCALES: gl.constexpr = ring.scales.type.shape[0] // BUFFERS
    barrier = ring.ready.index(slot)
    box_to_shared(ring.words_desc, [k, row_tile * (ROWS // 16), 0, 0], barrier, ring.words.index(slot))
    for i in gl.static_range(SCALES):
        first = (k * 64 + i * (64 * STEP // SCALES)) // GROUP * stride + row_tile * ROWS
        box_to_shared(ring.scale_desc, [first], barrier, ring.scales.index(slot * SCALES + i))
        if HAS_ZERO:
            box_to_shared(ring.zero_desc, [first], barrier, ring.zeros.index(slot * SCALES + i))


@gluon.jit
def bring_step(
    ring, slot, row_tile, first_token, k, stride,
    GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """All of the step from column block `k` on → `slot`."""
    expect_step(ring, slot, HAS_ZERO, BUFFERS)
    bring_weights(ring, slot, row_tile, k, stride, GROUP, HAS_ZERO, STEP, BUFFERS)
    bring_tokens(ring.x_desc, ring.x, slot, ring.ready.index(slot), first_token, k, BUFFERS)


@gluon.jit
def bring_first_steps(
    ring, row_tile, first_token, begin, end, stride,
    GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Fill the ring, with tokens once the kernel before has ended: weights do not wait for it; how many steps."""
    ahead = gl.minimum(gl.cdiv(end - begin, STEP), BUFFERS)
    for step in range(ahead):
        expect_step(ring, step, HAS_ZERO, BUFFERS)
        bring_weights(ring, step, row_tile, begin + step * STEP, stride, GROUP, HAS_ZERO, STEP, BUFFERS)
    wait_for_predecessor()
    for step in range(ahead):
        k = begin + step * STEP
        bring_tokens(ring.x_desc, ring.x, step, ring.ready.index(step), first_token, k, BUFFERS)
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
    TOKENS: gl.constexpr = tokens_of(ring.x_desc.block_type.shape)
    stride = order.stride
    _, row_tile, first_token, begin, end = task_of(order, gl.program_id(0), ROWS, TOKENS, SPLITS, RASTER, STEP)
    ahead = bring_first_steps(ring, row_tile, first_token, begin, end, stride, GROUP, HAS_ZERO, STEP, BUFFERS)
    count = ahead
    for item in range(gl.program_id(0), order.items, gl.num_programs(0)):
        _, row_tile, first_token, begin, end = task_of(order, item, ROWS, TOKENS, SPLITS, RASTER, STEP)
        done = gl.where(item == gl.program_id(0), ahead, 0)
        for step in range(done, gl.cdiv(end - begin, STEP)):
            slot = count % BUFFERS
            mbarrier.wait(free.index(slot), (count // BUFFERS & 1) ^ 1)
            k = begin + step * STEP
            bring_step(ring, slot, row_tile, first_token, k, stride, GROUP, HAS_ZERO, STEP, BUFFERS)
            count += 1
