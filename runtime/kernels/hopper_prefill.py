"""Many tokens on Hopper: large tiles of rows × tokens, by a producer and two or four consumers.

    producer (one warp)        words, scales, tokens of a step → a ring in shared memory, by the copy engine
    each consumer (four warps) its part of the rows: words → registers → unpack → wgmma with the step's tokens

Unpacked weights never touch shared memory: they are the left operand, from registers, in kernel order (see
`fragments`). The consumers meet only at the ring, so one unpacks while the product of another runs. What limits such a
kernel beside the tensor cores is the traffic from the L2 cache: a tile takes rows / 2 bytes of weights and 2 · tokens
bytes of tokens a column, so tall tiles are cheaper than wide ones.

Tiles that would leave the last wave of programs half empty are split along K (all tiles, where there are few); a second
launch adds their sums in a fixed order.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from runtime.kernels.copies import box_to_global
from runtime.kernels.fragments import release_successor
from runtime.kernels.hopper_tiles import (
    Ring,
    box,
    multiply_step,
    place_of,
    processors,
    produce,
    reduce_tiles,
    rows_box,
    scales_in,
    words_box,
)
from runtime.kernels.launch import Launcher


@gluon.jit
def consume(
    work, ring, free, part: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """The product of the rows of one part of the tile; to y, or to `partial` [ROWS, TOKENS] if the tile is split."""
    y_desc, staging, bias_ptr, partial_ptr, split, first_token, first_row, steps, N = work
    TOKENS: gl.constexpr = y_desc.block_type.shape[0]
    ROWS: gl.constexpr = y_desc.block_type.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout=mma)
    for step in range(steps):
        slot = step % BUFFERS
        mbarrier.wait(ring.ready.index(slot), step // BUFFERS & 1)
        total = multiply_step(total, ring, slot, part, HAS_ZERO, STEP, BUFFERS)
        mbarrier.arrive(free.index(slot), count=1)
    first_row += part * ROWS
    row = gl.arange(0, ROWS, gl.SliceLayout(1, mma))[:, None]
    if split:
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))[None, :]
        gl.store(partial_ptr + part * (ROWS * TOKENS) + row * TOKENS + token, total)
    else:
        if HAS_BIAS:
            at = first_row + row
            total += gl.load(bias_ptr + at, mask=at < N, other=0.0).to(gl.float32)
        own = staging.index(part)
        own.permute((1, 0)).store(total.to(y_desc.dtype))
        fence_async_shared()
        box_to_global(y_desc, [first_token, first_row], own)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "column_blocks", "whole"], do_not_specialize_on_alignment=["bias_ptr"])
def prefill_kernel(
    x_desc, words_desc, scale_desc, zero_desc, y_desc, partial_ptr, bias_ptr, M, N, column_blocks, whole,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ZERO: gl.constexpr, CONSUMERS: gl.constexpr,
    SPLITS: gl.constexpr, RASTER: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program: one of the first `whole` tiles, or one of SPLITS parts of K of a later tile."""
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    BLOCKS: gl.constexpr = words_desc.block_type.shape[0]
    ROWS: gl.constexpr = 16 * BLOCKS * CONSUMERS
    SCALES: gl.constexpr = scales_in(STEP, GROUP)
    x = gl.allocate_shared_memory(x_desc.dtype, [BUFFERS * STEP, TOKENS, 64], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [BUFFERS * CONSUMERS * STEP, BLOCKS, 4, 32], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.uint16, [BUFFERS * SCALES, ROWS], scale_desc.layout)
    zeros = scales
    if HAS_ZERO:
        zeros = gl.allocate_shared_memory(gl.uint16, [BUFFERS * SCALES, ROWS], zero_desc.layout)
    staging = gl.allocate_shared_memory(x_desc.dtype, [CONSUMERS, TOKENS, 16 * BLOCKS], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    release_successor()
    part = gl.program_id(0) - whole
    split = part >= 0
    tile = gl.where(split, whole + part // SPLITS, gl.program_id(0))
    row_tile, token_tile = place_of(tile, M, gl.cdiv(N, ROWS), TOKENS, RASTER)
    begin = gl.where(split, column_blocks * (part % SPLITS) // SPLITS, 0)
    end = gl.where(split, column_blocks * (part % SPLITS + 1) // SPLITS, column_blocks)
    partial_ptr += part.to(gl.int64) * (ROWS * TOKENS)
    first_token = token_tile * TOKENS
    ring = Ring(x_desc, words_desc, scale_desc, zero_desc, x, words, scales, zeros, ready)
    work = (y_desc, staging, bias_ptr, partial_ptr, split, first_token, row_tile * ROWS, gl.cdiv(end - begin, STEP), N)
    order = (row_tile, first_token, begin, end, N, column_blocks)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (work, ring, free, 0, HAS_BIAS, HAS_ZERO, STEP, BUFFERS)),
            (consume, (work, ring, free, 1, HAS_BIAS, HAS_ZERO, STEP, BUFFERS)),
            (produce, (order, ring, free, GROUP, HAS_ZERO, STEP, BUFFERS)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (work, ring, free, 0, HAS_BIAS, HAS_ZERO, STEP, BUFFERS)),
            (consume, (work, ring, free, 1, HAS_BIAS, HAS_ZERO, STEP, BUFFERS)),
            (consume, (work, ring, free, 2, HAS_BIAS, HAS_ZERO, STEP, BUFFERS)),
            (consume, (work, ring, free, 3, HAS_BIAS, HAS_ZERO, STEP, BUFFERS)),
            (produce, (order, ring, free, GROUP, HAS_ZERO, STEP, BUFFERS)),
        ], [4, 4, 4, 1], [120, 120, 120, 24])  # fmt: skip


launch_prefill = Launcher(prefill_kernel)


def prefill(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, *,
    rows: int, tokens: int, consumers: int, programs: int, splits: int, raster: int, step: int, buffers: int,
) -> Tensor:  # fmt: skip
    """x [M, K] · Ŵᵀ + bias → [M, N] for words [N/16, K/64, 128], scales and zero points [G, N] in kernel order.

    A group has `group` columns, a multiple of 16. Tiles have `rows` rows, 64 or 128 for each of the `consumers`, and
    `tokens` tokens; those after the last full wave of the GPU are split in `splits`. `programs` share a processor.
    """
    outputs = scale.shape[1]
    y = x.new_empty(x.shape[0], outputs)
    tiles = triton.cdiv(outputs, rows) * triton.cdiv(x.shape[0], tokens)
    wave = processors(x.device)
    whole = tiles if splits == 1 else tiles // wave * wave
    partial = x.new_empty(max(1, (tiles - whole) * splits * rows * tokens), dtype=torch.float32)
    scales = rows_box(scale, rows)
    args = (
        box(x, tokens, 64), words_box(words, rows // consumers), scales,
        scales if zero is None else rows_box(zero, rows), box(y, tokens, rows // consumers), partial,
        x if bias is None else bias, x.shape[0], outputs, words.shape[1], whole,
    )  # fmt: skip
    constants = {
        "GROUP": group, "HAS_BIAS": bias is not None, "HAS_ZERO": zero is not None, "CONSUMERS": consumers,
        "SPLITS": splits, "RASTER": raster, "STEP": step, "BUFFERS": buffers,
        "REGISTERS": 240 if programs == 1 else 104,
    }  # fmt: skip
    grid = (whole + (tiles - whole) * splits,)
    launch_prefill(grid, x, args, constants, num_warps=4, maxnreg=None if programs == 1 else 80)
    if tiles > whole:
        reduce_tiles(partial, bias, y, tiles - whole, whole, rows=rows, tokens=tokens, splits=splits, raster=raster)
    return y
