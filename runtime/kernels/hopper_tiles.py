"""What the wgmma kernels share: the order of tiles, weights from memory to operand registers, sums of split tiles."""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from runtime.kernels.fragments import release_successor, wait_for_predecessor, weights_of

GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
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
def box_of(first_token, k, end, column_blocks):
    """Where the tokens of step `k` begin; from `end` on past the matrix, where the copy engine reads zeros."""
    return [first_token, gl.where(k < end, k, column_blocks) * 64]


@gluon.jit
def fetch(words_at, scale_at, scale_8_at, k, end, N, GROUP: gl.constexpr):
    """Words and scales of column block `k` (or the last before `end`); each scale twice in an int32."""
    k = gl.minimum(k, end - 1)
    group = k * 64 // GROUP * N
    scale = gl.load(scale_at + group).to(gl.int32) * 0x10001
    scale_8 = gl.load(scale_8_at + group).to(gl.int32) * 0x10001
    return gl.load(words_at + k * 128), scale, scale_8


@gluon.constexpr_function
def fragment_layout(warps):
    """The layout of words [warps, g, c, t] as `fragments` draws it: a block a warp, four words a lane."""
    warp_bases = [[1 << i, 0, 0, 0] for i in range(warps.bit_length() - 1)]
    lane_bases = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 0, 0, 2]], lane_bases=lane_bases, warp_bases=warp_bases, block_bases=[],
        shape=[warps, 8, 4, 4],
    )  # fmt: skip


@gluon.jit
def weight_pointers(words_ptr, scale_ptr, row_block, row_blocks, column_blocks, N, WARPS: gl.constexpr):
    """Pointers to the words [WARPS, 128] of row blocks from `row_block` on, and to the scales of rows g and g + 8."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    block = row_block + gl.arange(0, WARPS, gl.SliceLayout(1, layout))
    start = gl.minimum(block, row_blocks - 1).to(gl.int64) * column_blocks * 128
    words_at = words_ptr + start[:, None] + gl.arange(0, 128, gl.SliceLayout(0, layout))[None, :]
    rows: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, fragment_layout(WARPS)))
    block = row_block + gl.arange(0, WARPS, gl.SliceLayout(1, rows))
    row = block[:, None] * 16 + gl.arange(0, 8, gl.SliceLayout(0, rows))[None, :]
    return words_at, scale_ptr + gl.minimum(row, N - 1), scale_ptr + gl.minimum(row + 8, N - 1)


@gluon.jit
def operand(words, scale, scale_8, LAYOUT: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr):
    """Words [WARPS, 128] and scales [WARPS, 8] → weights [16 · WARPS, 64] in the registers where wgmma reads them."""
    words = gl.convert_layout(gl.reshape(words, [WARPS, 8, 4, 4]), fragment_layout(WARPS), assert_trivial=True)
    scale = gl.expand_dims(gl.expand_dims(scale, 2), 3)
    scale_8 = gl.expand_dims(gl.expand_dims(scale_8, 2), 3)
    weights = weights_of(words, scale, scale_8, DTYPE)  # warp g c t · neighbour e j
    weights = gl.permute(weights, (0, 5, 1, 3, 6, 2, 4))  # warp e g | t j c neighbour
    return gl.convert_layout(gl.reshape(weights, [16 * WARPS, 64]), LAYOUT, assert_trivial=True)


@gluon.jit(do_not_specialize=["M"])
def reduce_kernel(
    partial_ptr, bias_ptr, y_ptr, whole, M, N, row_tiles,
    HAS_BIAS: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, SPLITS: gl.constexpr, RASTER: gl.constexpr,
    BLOCK_ROWS: gl.constexpr, BLOCK_TOKENS: gl.constexpr,
):  # fmt: skip
    """Add the SPLITS sums [ROWS, TOKENS] of a tile in their order and write it to y [M, N]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    out: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    release_successor()
    tile = gl.program_id(0)
    row_tile, token_tile = place_of(whole + tile, M, row_tiles, TOKENS, RASTER)
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


def reduce_tiles(
    partial: Tensor, bias: Tensor | None, y: Tensor, tiles: int, whole: int, *,
    rows: int, tokens: int, splits: int, raster: int,
) -> None:  # fmt: skip
    """Finish the last `tiles` tiles of y [M, N], which follow `whole` unsplit ones."""
    block_tokens = min(REDUCE_TOKENS, tokens)
    grid = (tiles, rows // REDUCE_ROWS, tokens // block_tokens)
    reduce_kernel[grid](
        partial, y if bias is None else bias, y, whole, *y.shape, triton.cdiv(y.shape[1], rows),
        HAS_BIAS=bias is not None, ROWS=rows, TOKENS=tokens, SPLITS=splits, RASTER=raster,
        BLOCK_ROWS=REDUCE_ROWS, BLOCK_TOKENS=block_tokens, num_warps=4, launch_pdl=True,
    )  # fmt: skip


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For the copy engine: boxes [rows, columns] of a contiguous matrix, swizzled in shared memory."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], GL_DTYPES[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
