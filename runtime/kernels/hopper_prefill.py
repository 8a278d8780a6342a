"""Many tokens on Hopper: tiles of 128 rows × up to 256 tokens, by two consumers and a producer.

    producer (one warp)      tokens [TOKENS, 64] → ring in shared memory, by the copy engine
    consumer 0 (four warps)  rows 0–63:    words → registers → unpack → wgmma with the ring's step → sums in registers
    consumer 1 (four warps)  rows 64–127:  the same

Weights never touch shared memory: they are the left operand, from registers, in kernel order (see `fragments`). While
the tensor cores work on a step, its consumer unpacks the next; and because the consumers meet only at the ring, one
unpacks while the other's product runs. Tiles that would leave the last wave of programs half empty are split along K
instead (all tiles, where there are few); a second launch adds their sums in a fixed order.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from runtime.kernels.copies import box_to_global, box_to_shared
from runtime.kernels.fragments import release_successor, wait_for_predecessor
from runtime.kernels.hopper_tiles import (
    box_of,
    descriptor,
    fetch,
    operand,
    place_of,
    reduce_tiles,
    weight_pointers,
)

ROWS = 128


@gluon.jit
def produce(x_desc, ring, ready, free, first_token, begin, end, column_blocks, BUFFERS: gl.constexpr):
    """Bring the tokens of every step as soon as both consumers have left its place in the ring."""
    wait_for_predecessor()
    for k in range(begin, begin + gl.cdiv(end - begin, 2) * 2):
        step = k - begin
        slot = step % BUFFERS
        mbarrier.wait(free.index(slot), (step // BUFFERS & 1) ^ 1)
        mbarrier.expect(ready.index(slot), x_desc.block_type.nbytes)
        box_to_shared(x_desc, box_of(first_token, k, end, column_blocks), ready.index(slot), ring.index(slot))


@gluon.jit
def advance(
    total, weights, words, scale, scale_8, k, begin, end, ring, ready, free, words_at, scale_at, scale_8_at, N,
    GROUP: gl.constexpr, BUFFERS: gl.constexpr, LEFT: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Add step `k`, whose `weights` are ready; meanwhile unpack `words` of the next and fetch those of step k + 3."""
    step = k - begin
    slot = step % BUFFERS
    mbarrier.wait(ready.index(slot), step // BUFFERS & 1)
    total = warpgroup_mma(weights, ring.index(slot).permute((1, 0)), total, is_async=True)
    next_weights = operand(words, scale, scale_8, LEFT, DTYPE, 4)
    words, scale, scale_8 = fetch(words_at, scale_at, scale_8_at, k + 3, end, N, GROUP)
    total, weights = warpgroup_mma_wait(0, deps=[total, weights])
    mbarrier.arrive(free.index(slot), count=1)
    return total, next_weights, words, scale, scale_8


@gluon.jit
def consume(
    y_desc, staging, ring, ready, free, words_ptr, scale_ptr, bias_ptr, partial, split, first_token, row_block,
    begin, end, N, row_blocks, column_blocks, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """The product of 64 rows from `row_block` on; to y, or to `partial` [64, TOKENS] if the tile is split."""
    TOKENS: gl.constexpr = y_desc.block_type.shape[0]
    DTYPE: gl.constexpr = y_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    words_at, scale_at, scale_8_at = weight_pointers(words_ptr, scale_ptr, row_block, row_blocks, column_blocks, N, 4)
    words_0, scale_0, scale_8_0 = fetch(words_at, scale_at, scale_8_at, begin, end, N, GROUP)
    words_1, scale_1, scale_8_1 = fetch(words_at, scale_at, scale_8_at, begin + 1, end, N, GROUP)
    weights = operand(words_0, scale_0, scale_8_0, left, DTYPE, 4)
    words_0, scale_0, scale_8_0 = fetch(words_at, scale_at, scale_8_at, begin + 2, end, N, GROUP)
    total = gl.zeros([64, TOKENS], gl.float32, layout=mma)
    # Two steps a turn, each with registers of its own: to hand words on from one name to the next would wait for them.
    for k in range(begin, begin + gl.cdiv(end - begin, 2) * 2, 2):  # past `end` the tokens are zeros
        total, weights, words_1, scale_1, scale_8_1 = advance(
            total, weights, words_1, scale_1, scale_8_1, k, begin, end, ring, ready, free,
            words_at, scale_at, scale_8_at, N, GROUP, BUFFERS, left, DTYPE,
        )  # fmt: skip
        total, weights, words_0, scale_0, scale_8_0 = advance(
            total, weights, words_0, scale_0, scale_8_0, k + 1, begin, end, ring, ready, free,
            words_at, scale_at, scale_8_at, N, GROUP, BUFFERS, left, DTYPE,
        )  # fmt: skip
    row = gl.arange(0, 64, gl.SliceLayout(1, mma))[:, None]
    if split:
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))[None, :]
        gl.store(partial + row * TOKENS + token, total)
    else:
        if HAS_BIAS:
            at = row_block * 16 + row
            total += gl.load(bias_ptr + at, mask=at < N, other=0.0).to(gl.float32)
        staging.permute((1, 0)).store(total.to(DTYPE))
        fence_async_shared()
        box_to_global(y_desc, [first_token, row_block * 16], staging)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def prefill_kernel(
    x_desc, y_desc, partial_ptr, words_ptr, scale_ptr, bias_ptr, M, N, row_blocks, column_blocks, whole,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLITS: gl.constexpr, RASTER: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """One program: one of the first `whole` tiles, or one of SPLITS parts of K of a later tile."""
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    ring = gl.allocate_shared_memory(x_desc.dtype, [BUFFERS, TOKENS, 64], x_desc.layout)
    staging = gl.allocate_shared_memory(x_desc.dtype, [2, TOKENS, 64], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    release_successor()
    part = gl.program_id(0) - whole
    split = part >= 0
    tile = gl.where(split, whole + part // SPLITS, gl.program_id(0))
    row_tile, token_tile = place_of(tile, M, gl.cdiv(row_blocks, 8), TOKENS, RASTER)
    begin = gl.where(split, column_blocks * (part % SPLITS) // SPLITS, 0)
    end = gl.where(split, column_blocks * (part % SPLITS + 1) // SPLITS, column_blocks)
    partial = partial_ptr + part.to(gl.int64) * (128 * TOKENS)
    first_token = token_tile * TOKENS
    gl.warp_specialize([
        (consume, (y_desc, staging.index(0), ring, ready, free, words_ptr, scale_ptr, bias_ptr, partial, split,
                   first_token, row_tile * 8, begin, end, N, row_blocks, column_blocks, GROUP, HAS_BIAS, BUFFERS)),
        (consume, (y_desc, staging.index(1), ring, ready, free, words_ptr, scale_ptr, bias_ptr, partial + 64 * TOKENS,
                   split, first_token, row_tile * 8 + 4, begin, end, N, row_blocks, column_blocks, GROUP, HAS_BIAS,
                   BUFFERS)),
        (produce, (x_desc, ring, ready, free, first_token, begin, end, column_blocks, BUFFERS)),
    ], [4, 1], [240, 24])  # fmt: skip


def prefill(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, group: int, *,
    tokens: int, splits: int, raster: int, buffers: int,
) -> Tensor:  # fmt: skip
    """x [M, K] · Ŵᵀ + bias → [M, N] for words [N/16, K/64, 128] and scales [G, N] in kernel order.

    A group has `group` columns, a multiple of 64. Tiles have 128 rows and `tokens` tokens; those after the last full
    wave of the GPU are split in `splits`.
    """
    outputs = scale.shape[1]
    y = x.new_empty(x.shape[0], outputs)
    tiles = triton.cdiv(outputs, ROWS) * triton.cdiv(x.shape[0], tokens)
    wave = torch.cuda.get_device_properties(x.device).multi_processor_count
    whole = tiles if splits == 1 else tiles // wave * wave
    partial = x.new_empty(max(1, (tiles - whole) * splits * ROWS * tokens), dtype=torch.float32)
    with torch.cuda.device_of(x):
        prefill_kernel[(whole + (tiles - whole) * splits,)](
            descriptor(x, tokens, 64), descriptor(y, tokens, 64), partial, words, scale.view(torch.uint16),
            x if bias is None else bias, x.shape[0], outputs, words.shape[0], words.shape[1], whole,
            GROUP=group, HAS_BIAS=bias is not None, SPLITS=splits, RASTER=raster, BUFFERS=buffers,
            num_warps=4, launch_pdl=True,
        )  # fmt: skip
        if tiles > whole:
            reduce_tiles(partial, bias, y, tiles - whole, whole, rows=ROWS, tokens=tokens, splits=splits, raster=raster)
    return y
