"""A ring of steps in shared memory that a program's own warps fill and empty.

A step is STEP blocks of 64 columns. The copy engine brings its words and its tokens, each as one box that a barrier of
its own waits for: all warps meet before whatever touches the same barrier again, so few boxes are worth more than small
ones. Scales and zero points come by asynchronous copies of 16 bytes, one for each stretch of a step that no border of a
group cuts; SCALES of them are in a step::

    words           [BUFFERS, STEP, tile rows / 16, 4, 32] int32     in kernel order, see `fragments`
    scales, zeros   [BUFFERS · SCALES, tile rows] 16 bits
    tokens          [BUFFERS, STEP, TOKENS, 64]
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from runtime.kernels.copies import box_to_shared, gather_to_shared, reinterpret
from runtime.kernels.fragments import wait_for_predecessor
from runtime.kernels.hopper_tiles import bring_tokens, scales_in, token_slots

ROWS_VIEW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
STRETCHES_VIEW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))


class Ring(NamedTuple):
    """The slots, and the barriers of what the copy engine brings there."""

    words: Any
    x: Any
    scales: Any
    zeros: Any
    words_ready: Any
    x_ready: Any


class Source(NamedTuple):
    """What a program reads: its row tile and tokens, from column block `begin` on, in so many steps."""

    x_desc: Any
    words_desc: Any
    scale_ptr: Any
    zero_ptr: Any
    N: Any
    K: Any
    stride: Any  # between the scales of two groups
    row_tile: Any
    first_token: Any
    begin: Any
    steps: Any


@gluon.jit
def ring_of(x_desc, words_desc, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr):
    """A ring for steps of STEP blocks."""
    BLOCKS: gl.constexpr = words_desc.block_type.shape[1]
    SCALES: gl.constexpr = scales_in(STEP, GROUP)
    words = gl.allocate_shared_memory(gl.int32, [BUFFERS, STEP, BLOCKS, 4, 32], words_desc.layout)
    x = gl.allocate_shared_memory(x_desc.dtype, token_slots(x_desc.block_type.shape, STEP, BUFFERS), x_desc.layout)
    scales = gl.allocate_shared_memory(gl.uint16, [BUFFERS * SCALES, 16 * BLOCKS], ROWS_VIEW)
    zeros = scales
    if HAS_ZERO:
        zeros = gl.allocate_shared_memory(gl.uint16, [BUFFERS * SCALES, 16 * BLOCKS], ROWS_VIEW)
    words_ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    x_ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(words_ready.index(i), count=1)
        mbarrier.init(x_ready.index(i), count=1)
    return Ring(words, x, scales, zeros, words_ready, x_ready)


@gluon.jit
def stretches(values, slot, BUFFERS: gl.constexpr):
    """The scales or zero points [SCALES, tile rows] of `slot`."""
    SHAPE: gl.constexpr = values.type.shape
    return reinterpret(values, gl.uint16, [BUFFERS, SHAPE[0] // BUFFERS, SHAPE[1]], STRETCHES_VIEW).index(slot)


@gluon.jit
def expect_step(ring, slot, source, BUFFERS: gl.constexpr):
    """Tell the barriers of `slot` how many bytes will come."""
    BOXES: gl.constexpr = ring.x.type.shape[0] // BUFFERS
    mbarrier.expect(ring.words_ready.index(slot), source.words_desc.block_type.nbytes)
    mbarrier.expect(ring.x_ready.index(slot), BOXES * source.x_desc.block_type.nbytes)


@gluon.jit
def bring_weights(ring, slot, source, step, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, BUFFERS: gl.constexpr):
    """Start to copy the words, scales and zero points of `step` to `slot`."""
    STEP: gl.constexpr = ring.words.type.shape[1]
    SCALES: gl.constexpr = ring.scales.type.shape[0] // BUFFERS
    ROWS: gl.constexpr = ring.scales.type.shape[1]
    k = source.begin + step * STEP
    box = [k, source.row_tile * (ROWS // 16), 0, 0]
    box_to_shared(source.words_desc, box, ring.words_ready.index(slot), ring.words.index(slot))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // ROWS, ROWS // 8], [gl.num_warps(), 1], [1, 0])
    row = source.row_tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, layout))[None, :]
    column = k * 64 + gl.arange(0, SCALES, gl.SliceLayout(1, layout))[:, None] * (64 * STEP // SCALES)
    # Past K the last group again: whatever the scale, as long as it is a number, it meets tokens that are 0.
    at = gl.minimum(column, source.K - 1) // GROUP * source.stride + row
    inside = (row < source.N) & (at >= 0)  # the second gives the mask its shape
    bits: gl.constexpr = gl.pointer_type(gl.uint16)
    gather_to_shared(stretches(ring.scales, slot, BUFFERS), source.scale_ptr.to(bits, bitcast=True) + at, mask=inside)
    if HAS_ZERO:
        gather_to_shared(stretches(ring.zeros, slot, BUFFERS), source.zero_ptr.to(bits, bitcast=True) + at, mask=inside)


@gluon.jit
def fill(ring, source, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, BUFFERS: gl.constexpr):
    """Start to copy the first steps, their tokens once the kernel before has ended: weights do not wait for it."""
    for slot in gl.static_range(BUFFERS):
        expect_step(ring, slot, source, BUFFERS)
    for slot in gl.static_range(BUFFERS):
        if slot < source.steps:
            bring_weights(ring, slot, source, slot, GROUP, HAS_ZERO, BUFFERS)
        async_copy.commit_group()
    wait_for_predecessor()
    for slot in range(gl.minimum(source.steps, BUFFERS)):
        k = source.begin + slot * ring.words.type.shape[1]
        bring_tokens(source.x_desc, ring.x, slot, ring.x_ready.index(slot), source.first_token, k, BUFFERS)


@gluon.jit
def wait_for_step(ring, step, BUFFERS: gl.constexpr):
    """The slot of `step`, once all of it is there."""
    slot = step % BUFFERS
    async_copy.wait_group(BUFFERS - 1)
    mbarrier.wait(ring.words_ready.index(slot), step // BUFFERS & 1)
    mbarrier.wait(ring.x_ready.index(slot), step // BUFFERS & 1)
    return slot


@gluon.jit
def refill(ring, source, step, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, BUFFERS: gl.constexpr):
    """Start to copy a later step, if there is one, to the slot of `step`, which all have read."""
    slot, late = step % BUFFERS, step + BUFFERS
    if late < source.steps:
        k = source.begin + late * ring.words.type.shape[1]
        expect_step(ring, slot, source, BUFFERS)
        bring_weights(ring, slot, source, late, GROUP, HAS_ZERO, BUFFERS)
        bring_tokens(source.x_desc, ring.x, slot, ring.x_ready.index(slot), source.first_token, k, BUFFERS)
    async_copy.commit_group()
