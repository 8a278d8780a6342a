"""A batch of tokens on Hopper: small tiles, K split among programs, several programs on a processor.

The programs on a processor hide each other's latencies. Each keeps its weights two to four steps ahead in registers (in
kernel order, see `fragments`) and lets the copy engine bring the tokens through a ring in shared memory; while the
tensor cores work on one step, the next one's weights are unpacked. Sums of a split tile are added in a second launch.
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


@gluon.jit
def advance(
    total, weights, words, scale, scale_8, k, begin, end, last, x_desc, first_token, ring, ready,
    words_at, scale_at, scale_8_at, column_blocks, N,
    GROUP: gl.constexpr, BUFFERS: gl.constexpr, LEFT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Add step `k`, whose `weights` are ready; meanwhile unpack `words` of the next and fetch those of step k + 5."""
    step = k - begin
    mbarrier.wait(ready.index(step % BUFFERS), step // BUFFERS & 1)
    total = warpgroup_mma(weights, ring.index(step % BUFFERS).permute((1, 0)), total, is_async=True)
    late, slot = k + BUFFERS - 1, (step + BUFFERS - 1) % BUFFERS
    mbarrier.expect(ready.index(slot), x_desc.block_type.nbytes, pred=late < last)
    box = box_of(first_token, late, end, column_blocks)
    box_to_shared(x_desc, box, ready.index(slot), ring.index(slot), pred=late < last)
    next_weights = operand(words, scale, scale_8, LEFT, x_desc.dtype, WARPS)
    words, scale, scale_8 = fetch(words_at, scale_at, scale_8_at, k + 5, end, N, GROUP)
    total, weights = warpgroup_mma_wait(0, deps=[total, weights])
    return total, next_weights, words, scale, scale_8


@gluon.jit(do_not_specialize=["M"])
def batch_kernel(
    x_desc, y_desc, partial_ptr, words_ptr, scale_ptr, bias_ptr, M, N, row_blocks, column_blocks,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLITS: gl.constexpr, RASTER: gl.constexpr, BUFFERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """One program: 16 rows a warp × a tile of tokens × one of SPLITS parts of K."""
    W: gl.constexpr = num_warps
    ROWS: gl.constexpr = 16 * W
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    DTYPE: gl.constexpr = x_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, TOKENS, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    ring = gl.allocate_shared_memory(DTYPE, [BUFFERS, TOKENS, 64], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(i), count=1)
    release_successor()
    row_tile, token_tile = place_of(gl.program_id(0), M, gl.cdiv(row_blocks, W), TOKENS, RASTER)
    first_token = token_tile * TOKENS
    begin = column_blocks * gl.program_id(1) // SPLITS
    end = column_blocks * (gl.program_id(1) + 1) // SPLITS

    words_at, scale_at, scale_8_at = weight_pointers(
        words_ptr, scale_ptr, row_tile * W, row_blocks, column_blocks, N, W
    )
    words_0, scale_0, scale_8_0 = fetch(words_at, scale_at, scale_8_at, begin, end, N, GROUP)
    words_1, scale_1, scale_8_1 = fetch(words_at, scale_at, scale_8_at, begin + 1, end, N, GROUP)
    words_2, scale_2, scale_8_2 = fetch(words_at, scale_at, scale_8_at, begin + 2, end, N, GROUP)
    words_3, scale_3, scale_8_3 = fetch(words_at, scale_at, scale_8_at, begin + 3, end, N, GROUP)
    weights = operand(words_0, scale_0, scale_8_0, left, DTYPE, W)
    words_0, scale_0, scale_8_0 = fetch(words_at, scale_at, scale_8_at, begin + 4, end, N, GROUP)
    last = begin + gl.cdiv(end - begin, 4) * 4  # whole turns of the loop; past `end` the tokens are zeros
    wait_for_predecessor()
    for i in gl.static_range(BUFFERS - 1):
        mbarrier.expect(ready.index(i), x_desc.block_type.nbytes, pred=begin + i < last)
        box = box_of(first_token, begin + i, end, column_blocks)
        box_to_shared(x_desc, box, ready.index(i), ring.index(i), pred=begin + i < last)
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout=mma)
    # Four steps a turn, each with registers of its own: to hand words on from one name to the next would wait for them.
    for k in range(begin, last, 4):
        total, weights, words_1, scale_1, scale_8_1 = advance(
            total, weights, words_1, scale_1, scale_8_1, k, begin, end, last, x_desc, first_token, ring, ready,
            words_at, scale_at, scale_8_at, column_blocks, N, GROUP, BUFFERS, left, W,
        )  # fmt: skip
        total, weights, words_2, scale_2, scale_8_2 = advance(
            total, weights, words_2, scale_2, scale_8_2, k + 1, begin, end, last, x_desc, first_token, ring, ready,
            words_at, scale_at, scale_8_at, column_blocks, N, GROUP, BUFFERS, left, W,
        )  # fmt: skip
        total, weights, words_3, scale_3, scale_8_3 = advance(
            total, weights, words_3, scale_3, scale_8_3, k + 2, begin, end, last, x_desc, first_token, ring, ready,
            words_at, scale_at, scale_8_at, column_blocks, N, GROUP, BUFFERS, left, W,
        )  # fmt: skip
        total, weights, words_0, scale_0, scale_8_0 = advance(
            total, weights, words_0, scale_0, scale_8_0, k + 3, begin, end, last, x_desc, first_token, ring, ready,
            words_at, scale_at, scale_8_at, column_blocks, N, GROUP, BUFFERS, left, W,
        )  # fmt: skip
    for i in gl.static_range(BUFFERS):
        mbarrier.invalidate(ready.index(i))

    row = gl.arange(0, ROWS, gl.SliceLayout(1, mma))[:, None]
    if SPLITS > 1:
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))[None, :]
        part = (gl.program_id(0) * SPLITS + gl.program_id(1)).to(gl.int64) * (ROWS * TOKENS)
        gl.store(partial_ptr + part + row * TOKENS + token, total)
    else:
        if HAS_BIAS:
            at = row_tile * ROWS + row
            total += gl.load(bias_ptr + at, mask=at < N, other=0.0).to(gl.float32)
        staging = gl.allocate_shared_memory(DTYPE, [TOKENS, ROWS], y_desc.layout)
        staging.permute((1, 0)).store(total.to(DTYPE))
        fence_async_shared()
        box_to_global(y_desc, [first_token, row_tile * ROWS], staging)
        tma.store_wait(0)


def batch(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, group: int, *,
    tokens: int, warps: int, splits: int, raster: int, buffers: int,
) -> Tensor:  # fmt: skip
    """x [M, K] · Ŵᵀ + bias → [M, N] for words [N/16, K/64, 128] and scales [G, N] in kernel order.

    A group has `group` columns, a multiple of 64. Tiles have 16 · `warps` rows and `tokens` tokens.
    """
    outputs = scale.shape[1]
    y = x.new_empty(x.shape[0], outputs)
    tiles = triton.cdiv(words.shape[0], warps) * triton.cdiv(x.shape[0], tokens)
    partial = x.new_empty(tiles * splits * 16 * warps * tokens if splits > 1 else 1, dtype=torch.float32)
    with torch.cuda.device_of(x):
        batch_kernel[(tiles, splits)](
            descriptor(x, tokens, 64), descriptor(y, tokens, 16 * warps), partial, words, scale.view(torch.uint16),
            x if bias is None else bias, x.shape[0], outputs, words.shape[0], words.shape[1],
            GROUP=group, HAS_BIAS=bias is not None, SPLITS=splits, RASTER=raster, BUFFERS=buffers,
            num_warps=warps, launch_pdl=True,
        )  # fmt: skip
        if splits > 1:
            reduce_tiles(partial, bias, y, tiles, 0, rows=16 * warps, tokens=tokens, splits=splits, raster=raster)
    return y
