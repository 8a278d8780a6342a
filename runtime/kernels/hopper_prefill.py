"""Many tokens on Hopper: large tiles of rows × tokens, by a producer and two consumers::

    producer (one warp)        words, scales, tokens of a step → a ring in shared memory, by the copy engine
    consumer 0 (four warps)    rows of the upper half: words → registers → unpack → wgmma with the step's tokens
    consumer 1 (four warps)    rows of the lower half: the same

Unpacked weights never touch shared memory: they are the left operand, from registers, in kernel order (see
`fragments`). The consumers meet only at the ring, so one unpacks while the product of the other runs; and while they
write one tile, the producer already brings the next. What limits such a kernel beside the tensor cores is the traffic
from the L2 cache: a tile takes rows / 2 bytes of weights and 2 · tokens bytes of tokens a column, so that with few
tokens tall tiles are cheaper.

Tiles that would leave the last wave of programs half empty are split along K (all tiles, where there are few); a second
launch adds their sums in a fixed order.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from formats.layout import ceil_div
from runtime.kernels.copies import box_to_global
from runtime.kernels.fragments import release_successor
from runtime.kernels.hopper_choice import SHARED_BYTES
from runtime.kernels.hopper_producer import Order, Ring, produce, ready_and_free, task_of
from runtime.kernels.hopper_tiles import (
    box,
    multiply_step,
    processors,
    reduce_tiles,
    rows_box,
    scales_in,
    token_slots,
    tokens_box,
    tokens_of,
    words_box,
)
from runtime.kernels.launch import Launcher


@gluon.jit
def consume(
    order, ring, free, out, part: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_ZERO: gl.constexpr, SPLITS: gl.constexpr, RASTER: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """The products of the rows of one part of every tile; to y, or to `partial` if the tile is split."""
    y_desc, staging, bias_ptr, partial_ptr = out
    TOKENS: gl.constexpr = y_desc.block_type.shape[0]
    ROWS: gl.constexpr = y_desc.block_type.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    own = staging.index(part)
    row = part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, mma))[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))[None, :]
    count = 0
    for item in range(gl.program_id(0), order.items, gl.num_programs(0)):
        piece, row_tile, first_token, begin, end = task_of(order, item, 2 * ROWS, TOKENS, SPLITS, RASTER, STEP)
        total = gl.zeros([ROWS, TOKENS], gl.float32, layout=mma)
        for _ in range(gl.cdiv(end - begin, STEP)):
            slot = count % BUFFERS
            mbarrier.wait(ring.ready.index(slot), count // BUFFERS & 1)
            total = multiply_step(total, ring, slot, part, HAS_ZERO, 2, STEP, BUFFERS)
            mbarrier.arrive(free.index(slot), count=1)
            count += 1
        if piece >= 0:
            sums = partial_ptr + piece.to(gl.int64) * (2 * ROWS * TOKENS)
            gl.store(sums + row * TOKENS + token, total)
        else:
            first_row = row_tile * (2 * ROWS)
            if HAS_BIAS:
                at = first_row + row
                total += gl.load(bias_ptr + at, mask=at < order.N, other=0.0).to(gl.float32)
            tma.store_wait(0)  # for the tile before
            own.permute((1, 0)).store(total.to(y_desc.dtype))
            fence_async_shared()
            box_to_global(y_desc, [first_token, first_row + part * ROWS], own)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["M", "N", "stride", "column_blocks", "whole", "items"],
    do_not_specialize_on_alignment=["bias_ptr"],
)
def prefill_kernel(
    x_desc, words_desc, scale_desc, zero_desc, y_desc, partial_ptr, bias_ptr, M, N, stride, column_blocks, whole, items,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ZERO: gl.constexpr, SPLITS: gl.constexpr,
    RASTER: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th of the items."""
    X_BOX: gl.constexpr = x_desc.block_type.shape
    TOKENS: gl.constexpr = tokens_of(X_BOX)
    BLOCKS: gl.constexpr = words_desc.block_type.shape[1]
    ROWS: gl.constexpr = 16 * BLOCKS
    SCALES: gl.constexpr = scales_in(STEP, GROUP)
    x = gl.allocate_shared_memory(x_desc.dtype, token_slots(X_BOX, STEP, BUFFERS), x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [BUFFERS, STEP, BLOCKS, 4, 32], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.uint16, [BUFFERS * SCALES, ROWS], scale_desc.layout)
    zeros = scales
    if HAS_ZERO:
        zeros = gl.allocate_shared_memory(gl.uint16, [BUFFERS * SCALES, ROWS], zero_desc.layout)
    staging = gl.allocate_shared_memory(x_desc.dtype, [2, TOKENS, ROWS // 2], y_desc.layout)
    ready, free = ready_and_free(BUFFERS)
    release_successor()
    ring = Ring(x_desc, words_desc, scale_desc, zero_desc, x, words, scales, zeros, ready)
    order = Order(M, N, stride, column_blocks, whole, items)
    out = (y_desc, staging, bias_ptr, partial_ptr)
    gl.warp_specialize([
        (consume, (order, ring, free, out, 0, HAS_BIAS, HAS_ZERO, SPLITS, RASTER, STEP, BUFFERS)),
        (consume, (order, ring, free, out, 1, HAS_BIAS, HAS_ZERO, SPLITS, RASTER, STEP, BUFFERS)),
        (produce, (order, ring, free, ROWS, GROUP, HAS_ZERO, SPLITS, RASTER, STEP, BUFFERS)),
    ], [4, 1], [REGISTERS, 32])  # fmt: skip


launch_prefill = Launcher(prefill_kernel)
OTHER_BYTES = 1024  # barriers, and what the compiler keeps


@cache
def fitting(buffers: int, rows: int, tokens: int, step: int, group: int, kinds: int, programs: int) -> int:
    """As many of `buffers` slots as `programs` have room for, with scales and (if `kinds` is 2) zero points."""
    slot: int = step * (128 * tokens + 32 * rows) + scales_in(step, group) * 2 * rows * kinds
    return min(buffers, (SHARED_BYTES // programs - 2 * rows * tokens - OTHER_BYTES) // slot)


def prefill(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, *,
    rows: int, tokens: int, programs: int, splits: int, raster: int, step: int, buffers: int,
) -> Tensor:  # fmt: skip
    """x [M, K] · Ŵᵀ + bias → [M, N] for words [N/16, K/64, 128], scales and zero points [G, N] in kernel order.

    A group has `group` columns, a multiple of 16. Tiles have `rows` (128 or 256) rows and `tokens` tokens; those after
    the last full wave of the GPU are split in `splits`. `programs` share a processor. Narrow groups, whose scales fill
    the slots, may leave room for fewer than `buffers`.
    """
    outputs = scale.shape[1]
    y = x.new_empty(x.shape[0], outputs)
    tiles = ceil_div(outputs, rows) * ceil_div(x.shape[0], tokens)
    wave = processors(x.device) * programs
    whole = tiles if splits == 1 else tiles // wave * wave
    items = whole + (tiles - whole) * splits
    partial = x.new_empty(max(1, (tiles - whole) * splits * rows * tokens), dtype=torch.float32)
    buffers = fitting(buffers, rows, tokens, step, group, 1 if zero is None else 2, programs)
    args = (
        tokens_box(x, tokens, step), words_box(words, rows, step), rows_box(scale, rows),
        words if zero is None else rows_box(zero, rows), box(y, tokens, rows // 2), partial,
        x if bias is None else bias, x.shape[0], outputs, scale.stride(0), words.shape[1], whole, items,
    )  # fmt: skip
    constants = {
        "GROUP": group, "HAS_BIAS": bias is not None, "HAS_ZERO": zero is not None,
        "SPLITS": splits, "RASTER": raster, "STEP": step, "BUFFERS": buffers,
        "REGISTERS": 240 if programs == 1 else 104,
    }  # fmt: skip
    launch_prefill((min(items, wave),), x, args, constants, num_warps=4, maxnreg=None if programs == 1 else 80)
    if tiles > whole:
        reduce_tiles(partial, bias, y, tiles - whole, whole, rows=rows, tokens=tokens, splits=splits, raster=raster)
    return y
