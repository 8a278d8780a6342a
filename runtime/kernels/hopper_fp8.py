"""Many tokens in fp8 on Hopper: twice the rate of bf16, by a producer and two consumers as in `hopper_prefill`.

One launch turns every token into e4m3 with a scale of its own (`runtime.activations`), the next multiplies. The codes
are exact in e4m3, and four instructions make four of them from the words in kernel order (see `fragments`). Of each 16
columns lanes hold 2c, 2c + 8, 2c + 1 and 2c + 9, where the fp8 tensor cores want four neighbours: so the tokens are
stored with their columns in that order. The tensor cores add up STEP blocks of columns; these sums, times the scales of
the group, are added in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from formats.layout import ceil_div
from runtime import activations
from runtime.kernels.copies import box_to_global
from runtime.kernels.fragments import CODE_UNIT, codes_in_fp8, release_successor
from runtime.kernels.hopper_producer import Order, Ring, produce, ready_and_free, task_of
from runtime.kernels.hopper_tiles import box, fragment_layout, processors, rows_box, words_box, words_layout
from runtime.kernels.launch import Launcher

TILE = 256  # tokens, at most
LARGEST, SMALLEST = tl.constexpr(activations.LARGEST), tl.constexpr(activations.SMALLEST)


@triton.jit(do_not_specialize=["eighths", "stride"])
def quantize_tokens_kernel(x_ptr, y_ptr, scale_ptr, eighths, stride, BLOCK: tl.constexpr):
    """One program: a token [K] → e4m3 [stride] in the order of the kernel, zeros at the end, and its scale."""
    gdc_launch_dependents()
    K = eighths * 8
    column = tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64)
    gdc_wait()
    x = tl.load(x_ptr + token * K + column, mask=column < K, other=0.0, eviction_policy="evict_first").to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0) * (1 / LARGEST), SMALLEST)
    tl.store(scale_ptr + token, scale)
    y = tl.clamp(x * tl.div_rn(1.0, scale), -LARGEST, LARGEST).to(tl.float8e4nv)
    y = tl.permute(tl.reshape(y, (BLOCK // 16, 2, 4, 2)), (0, 2, 3, 1))  # of 16 columns, j c neighbour → c neighbour j
    tl.store(y_ptr + token * (stride * 64) + column, tl.reshape(y, (BLOCK,)), mask=column < stride * 64)


@gluon.jit
def operand(words, part: gl.constexpr, STEP: gl.constexpr, LAYOUT: gl.constexpr):
    """The codes [64, 64 · STEP] of half of a step's words [STEP, 8, 4, 32] as e4m3, where wgmma reads them."""
    codes = gl.reshape(words.slice(part * 4, 4, dim=1).load(words_layout(4)), [STEP, 4, 8, 4, 4])
    codes = gl.convert_layout(gl.permute(codes, (1, 0, 2, 3, 4)), fragment_layout(4, STEP, 4), assert_trivial=True)
    codes = codes_in_fp8(codes)  # block step g c t e i
    codes = gl.reshape(gl.permute(codes, (0, 5, 2, 1, 4, 3, 6)), [64, 64 * STEP])  # block e g | step t c i
    return gl.convert_layout(codes, LAYOUT, assert_trivial=True)


@gluon.jit
def consume(
    order, ring, free, out, part: gl.constexpr, HAS_BIAS: gl.constexpr, RASTER: gl.constexpr, STEP: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """The products of 64 rows of every tile with its tokens, 128 tokens at a time."""
    y_desc, staging, bias_ptr, token_scale_ptr = out
    TOKENS: gl.constexpr = y_desc.block_type.shape[0]
    PIECES: gl.constexpr = TOKENS // 128
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    own = staging.index(part)
    count = 0
    for item in range(gl.program_id(0), order.items, gl.num_programs(0)):
        _, row_tile, first_token, _, _ = task_of(order, item, 128, TOKENS, 1, RASTER, STEP)
        totals = ()
        for _ in gl.static_range(PIECES):
            totals += (gl.zeros([64, 128], gl.float32, layout=mma),)
        for _ in range(gl.cdiv(order.column_blocks, STEP)):
            slot = count % BUFFERS
            mbarrier.wait(ring.ready.index(slot), count // BUFFERS & 1)
            scale = ring.scales.index(slot).slice(part * 64, 64).load(gl.SliceLayout(1, mma))
            scale = scale.to(gl.int16, bitcast=True).to(y_desc.dtype, bitcast=True).to(gl.float32)
            codes = operand(ring.words.index(slot), part, STEP, left)
            for piece in gl.static_range(PIECES):
                tokens = ring.x.index(slot).slice(piece * 128, 128).permute((1, 0))
                product = warpgroup_mma(codes, tokens, gl.zeros([64, 128], gl.float32, layout=mma), use_acc=False)
                total = gl.fma(product, gl.expand_dims(scale, 1) + gl.zeros_like(product), totals[piece])
                totals = totals[:piece] + (total,) + totals[piece + 1 :]
            mbarrier.arrive(free.index(slot), count=1)
            count += 1
        first_row = row_tile * 128 + part * 64
        tma.store_wait(0)  # for the tile before
        for piece in gl.static_range(PIECES):
            token = first_token + piece * 128 + gl.arange(0, 128, gl.SliceLayout(0, mma))
            token_scale = gl.load(token_scale_ptr + token)
            y = totals[piece] * gl.expand_dims(token_scale * (1 / CODE_UNIT), 0)
            if HAS_BIAS:
                at = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma))[:, None]
                y += gl.load(bias_ptr + at, mask=at < order.N, other=0.0).to(gl.float32)
            own.slice(piece * 128, 128).permute((1, 0)).store(y.to(y_desc.dtype))
        fence_async_shared()
        box_to_global(y_desc, [first_token, first_row], own)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["M", "N", "stride", "column_blocks", "items"], do_not_specialize_on_alignment=["bias_ptr"]
)
def fp8_kernel(
    x_desc, words_desc, scale_desc, y_desc, token_scale_ptr, bias_ptr, M, N, stride, column_blocks, items,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, RASTER: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th of the tiles of 128 rows × TOKENS tokens."""
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    x = gl.allocate_shared_memory(gl.float8e4nv, [BUFFERS, TOKENS, 64 * STEP], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [BUFFERS, STEP, 8, 4, 32], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.uint16, [BUFFERS, 128], scale_desc.layout)
    staging = gl.allocate_shared_memory(y_desc.dtype, [2, TOKENS, 64], y_desc.layout)
    ready, free = ready_and_free(BUFFERS)
    release_successor()
    ring = Ring(x_desc, words_desc, scale_desc, scale_desc, x, words, scales, scales, ready)
    order = Order(M, N, stride, column_blocks, items, items)
    out = (y_desc, staging, bias_ptr, token_scale_ptr)
    gl.warp_specialize([
        (consume, (order, ring, free, out, 0, HAS_BIAS, RASTER, STEP, BUFFERS)),
        (consume, (order, ring, free, out, 1, HAS_BIAS, RASTER, STEP, BUFFERS)),
        (produce, (order, ring, free, 128, GROUP, False, 1, RASTER, STEP, BUFFERS)),
    ], [4, 1], [240, 32])  # fmt: skip


launch_quantize = Launcher(quantize_tokens_kernel)
launch_fp8 = Launcher(fp8_kernel)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [M, K] → e4m3 [M, K up to a multiple of 64] in the order of the kernel, and their scales fp32 [M]."""
    tokens, columns = x.shape
    y = x.new_empty(tokens, ceil_div(columns, 64) * 64, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(ceil_div(tokens, TILE) * TILE, dtype=torch.float32)[:tokens]  # a tile reads all of its own
    block = triton.next_power_of_2(y.shape[1])
    args = (x, y, scale, columns // 8, y.shape[1] // 64)
    launch_quantize((tokens,), x, args, {"BLOCK": block}, num_warps=min(16, max(1, block // 1024)))
    return y, scale


def fp8(
    x: Tensor, words: Tensor, scale: Tensor, zero: None, bias: Tensor | None, group: int, *,
    tokens: int, raster: int, buffers: int,
) -> Tensor:  # fmt: skip
    """x̂ [M, K] · Ŵᵀ + bias → [M, N] in the type of x, with x̂ in e4m3; words [N/16, K/64, 128], scales [G, N].

    A group has `group` columns, a multiple of 64. Tiles have 128 rows and `tokens` (128 or 256) tokens.
    """
    x8, token_scale = quantize_tokens(x)
    step = 2 if group % 128 == 0 else 1
    y = x.new_empty(x.shape[0], scale.shape[1])
    tiles = ceil_div(y.shape[1], 128) * ceil_div(x.shape[0], tokens)
    args = (
        box(x8, tokens, 64 * step), words_box(words, 128, step), rows_box(scale, 128), box(y, tokens, 64), token_scale,
        x if bias is None else bias, *y.shape, scale.stride(0), words.shape[1], tiles,
    )  # fmt: skip
    constants = {"GROUP": group, "HAS_BIAS": bias is not None, "RASTER": raster, "STEP": step, "BUFFERS": buffers}
    launch_fp8((min(tiles, processors(x.device)),), x, args, constants, num_warps=4)
    return y
