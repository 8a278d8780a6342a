"""A batch of tokens on Hopper: small tiles, K split among programs, several programs on a processor.

The programs on a processor hide each other's latencies. Words, scales and tokens pass through a ring in shared memory
(see `hopper_ring`); while the tensor cores work on one block of columns, the next one's weights are unpacked into
registers (see `hopper_tiles`). Sums of a split tile are added in a second launch.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from formats.layout import ceil_div
from runtime.kernels.copies import box_to_global
from runtime.kernels.fragments import release_successor
from runtime.kernels.hopper_ring import Source, fill, refill, ring_of, wait_for_step
from runtime.kernels.hopper_tiles import (
    box,
    multiply_step,
    place_of,
    range_of,
    reduce_tiles,
    tokens_box,
    tokens_of,
    words_box,
)
from runtime.kernels.launch import Launcher


@gluon.jit(
    do_not_specialize=["M", "eighths", "K", "stride", "column_blocks"], do_not_specialize_on_alignment=["bias_ptr"]
)
def batch_kernel(
    x_desc, words_desc, scale_ptr, zero_ptr, y_desc, partial_ptr, bias_ptr, M, eighths, K, stride, column_blocks,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ZERO: gl.constexpr, SPLITS: gl.constexpr, RASTER: gl.constexpr,
    STEP: gl.constexpr, BUFFERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program: 16 rows a warp × a tile of tokens × one of SPLITS parts of K."""
    ROWS: gl.constexpr = 16 * num_warps
    TOKENS: gl.constexpr = tokens_of(x_desc.block_type.shape)
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, TOKENS, 16]
    )
    ring = ring_of(x_desc, words_desc, GROUP, HAS_ZERO, STEP, BUFFERS)
    release_successor()
    N, stride = eighths * 8, stride * 8  # so that the compiler knows that rows start at 16 bytes
    row_tile, token_tile = place_of(gl.program_id(0), M, gl.cdiv(N, ROWS), TOKENS, RASTER)
    first_token = token_tile * TOKENS
    begin, end = range_of(column_blocks, gl.program_id(1), SPLITS, STEP)
    steps = gl.cdiv(end - begin, STEP)
    source = Source(x_desc, words_desc, scale_ptr, zero_ptr, N, K, stride, row_tile, first_token, begin, steps)
    fill(ring, source, GROUP, HAS_ZERO, BUFFERS)
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout=mma)
    for step in range(steps):
        slot = wait_for_step(ring, step, BUFFERS)
        total = multiply_step(total, ring, slot, 0, HAS_ZERO, 1, STEP, BUFFERS)
        refill(ring, source, step, GROUP, HAS_ZERO, BUFFERS)

    row = gl.arange(0, ROWS, gl.SliceLayout(1, mma))[:, None]
    if SPLITS > 1:
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))[None, :]
        part = (gl.program_id(0) * SPLITS + gl.program_id(1)).to(gl.int64) * (ROWS * TOKENS)
        gl.store(partial_ptr + part + row * TOKENS + token, total)
    else:
        if HAS_BIAS:
            at = row_tile * ROWS + row
            total += gl.load(bias_ptr + at, mask=at < N, other=0.0).to(gl.float32)
        staging = gl.allocate_shared_memory(x_desc.dtype, [TOKENS, ROWS], y_desc.layout)
        staging.permute((1, 0)).store(total.to(x_desc.dtype))
        fence_async_shared()
        box_to_global(y_desc, [first_token, row_tile * ROWS], staging)
        tma.store_wait(0)


launch_batch = Launcher(batch_kernel)


def batch(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, *,
    tokens: int, warps: int, splits: int, raster: int, step: int, buffers: int,
) -> Tensor:  # fmt: skip
    """x [M, K] · Ŵᵀ + bias → [M, N] for words [N/16, K/64, 128], scales and zero points [G, N] in kernel order.

    A group has `group` columns, a multiple of 16. Tiles have 16 · `warps` rows and `tokens` tokens.
    """
    outputs, rows = scale.shape[1], 16 * warps
    y = x.new_empty(x.shape[0], outputs)
    tiles = ceil_div(outputs, rows) * ceil_div(x.shape[0], tokens)
    partial = x.new_empty(tiles * splits * rows * tokens, dtype=torch.float32) if splits > 1 else y
    args = (
        tokens_box(x, tokens, step), words_box(words, rows, step), scale, words if zero is None else zero,
        box(y, tokens, rows), partial, x if bias is None else bias, x.shape[0], outputs // 8, x.shape[1],
        scale.stride(0) // 8, words.shape[1],
    )  # fmt: skip
    constants = {
        "GROUP": group, "HAS_BIAS": bias is not None, "HAS_ZERO": zero is not None, "SPLITS": splits,
        "RASTER": raster, "STEP": step, "BUFFERS": buffers, "num_warps": warps,
    }  # fmt: skip
    launch_batch((tiles, splits), x, args, constants)
    if splits > 1:
        reduce_tiles(partial, bias, y, tiles, 0, rows=rows, tokens=tokens, splits=splits, raster=raster)
    return y
