"""Few tokens on Hopper: every warp of a program takes its share of K, and the program adds the shares up at the end.

The bytes of the weights decide the time. They wait in a ring in shared memory (see `hopper_ring`), where they cost no
registers: several programs fit on a processor, and those of the next kernel fill their rings while this one ends. A
step has STEP blocks of 64 columns for every warp; each warp unpacks its own into the operand of its tensor core (see
`fragments`), and what reaches past K meets tokens that are 0.

Matrices with few rows are split along K among SPLITS programs; a second launch adds their sums in a fixed order.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from formats.layout import ceil_div
from runtime.kernels.copies import reinterpret
from runtime.kernels.fragments import codes_of, release_successor, shifted_weights_of, weights_of
from runtime.kernels.hopper_ring import Source, fill, refill, ring_of, stretches, wait_for_step
from runtime.kernels.hopper_tiles import doublings, range_of, reduce_tiles, tokens_box, tokens_of, words_box
from runtime.kernels.launch import Launcher

TOKENS_VIEW = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))


@gluon.constexpr_function
def words_layout(warps, blocks, step):
    """Words [warps · step, blocks, 4, 32] of a slot: four words a lane, `step` blocks of columns a warp."""
    along = [[b, 0, 0, 0] for b in doublings(1, step)]
    across = [[0, b, 0, 0] for b in doublings(1, blocks)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 0, 0, 2], *along, *across],
        lane_bases=[[0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 0, 16], [0, 0, 1, 0], [0, 0, 2, 0]],
        warp_bases=[[b, 0, 0, 0] for b in doublings(step, warps)], block_bases=[], shape=[warps * step, blocks, 4, 32],
    )  # fmt: skip


@gluon.constexpr_function
def fragment_layout(warps, blocks, step):
    """The same words [warps, blocks, step, g, c, t] as `fragments` draws them."""
    along = [[0, 0, b, 0, 0, 0] for b in doublings(1, step)]
    across = [[0, b, 0, 0, 0, 0] for b in doublings(1, blocks)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2], *along, *across],
        lane_bases=[[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0], [0, 0, 0, 4, 0, 0]],
        warp_bases=[[b, 0, 0, 0, 0, 0] for b in doublings(1, warps)], block_bases=[],
        shape=[warps, blocks, step, 8, 4, 4],
    )  # fmt: skip


@gluon.constexpr_function
def tokens_layout(warps, tokens, step):
    """Tokens [warps · step, tokens, 64] of a slot: lane 4g + c has token g and columns 2c, 2c + 1 of every eight.

    A single token is what all lanes 4g + c have.
    """
    one = 0 if tokens == 1 else 1
    along = [[b, 0, 0] for b in doublings(1, step)]
    across = [[0, b, 0] for b in doublings(8, tokens // 8)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 8], [0, 0, 16], [0, 0, 32], *along, *across],
        lane_bases=[[0, 0, 2], [0, 0, 4], [0, one, 0], [0, 2 * one, 0], [0, 4 * one, 0]],
        warp_bases=[[b, 0, 0] for b in doublings(step, warps)], block_bases=[], shape=[warps * step, tokens, 64],
    )  # fmt: skip


@gluon.constexpr_function
def values_layout(scales, stretches, warps, rows):
    """Scales [scales, repeats, rows] of a slot, repeated so that each of the warps' `stretches` of columns has one."""
    repeats = stretches // scales

    def column(stretch):
        return [stretch // repeats, stretch % repeats, 0]

    own = stretches // warps
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 8], *([0, 0, b] for b in doublings(16, rows // 16)), *map(column, doublings(1, own))],
        lane_bases=[[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        warp_bases=[*map(column, doublings(own, warps))], block_bases=[], shape=[scales, repeats, rows],
    )  # fmt: skip


@gluon.constexpr_function
def shares_layout(warps, height, width):
    """Sums [warps, height, width]: each lane adds up what all warps have for its elements, neighbours in a row."""
    each = max(1, min(8, height * width // (32 * warps)))
    across = min(32, width // each)
    return gl.BlockedLayout([warps, 1, each], [1, 32 // across, across], [1, warps, 1], [2, 1, 0])


@gluon.jit
def values_of(values, STRETCHES: gl.constexpr, WARPS: gl.constexpr):
    """Scales or zero points of a slot as int32 [STRETCHES, ROWS], by the stretches of columns of all warps."""
    layout: gl.constexpr = values_layout(values.shape[0], STRETCHES, WARPS, values.shape[1])
    SHAPE: gl.constexpr = layout.shape
    found = gl.expand_dims(values.load(gl.SliceLayout(1, layout)).to(gl.int32), 1)
    return gl.reshape(found + gl.zeros(SHAPE, gl.int32, layout=layout), [STRETCHES, values.shape[1]])


@gluon.jit
def of_rows(values, TILES: gl.constexpr, FRAGMENT: gl.constexpr):
    """Scales or zero points of rows g and 8 + g as int32, each value twice, to meet the words; one for TILES tiles."""
    SHAPE: gl.constexpr = FRAGMENT.shape
    EACH: gl.constexpr = 4 // TILES
    both = values_of(values, SHAPE[0] * SHAPE[2] * EACH, SHAPE[0]) * 0x10001
    both = gl.reshape(both, [SHAPE[0], SHAPE[2], EACH, SHAPE[1], 2, 8])
    low, high = gl.split(gl.permute(both, (0, 3, 1, 5, 2, 4)))  # warp block step g stretch
    each: gl.constexpr = gl.SliceLayout(4, FRAGMENT)
    if EACH == 1:
        same: gl.constexpr = gl.SliceLayout(4, each)
        low = gl.convert_layout(gl.reshape(low, [SHAPE[0], SHAPE[1], SHAPE[2], 8]), same, assert_trivial=True)
        high = gl.convert_layout(gl.reshape(high, [SHAPE[0], SHAPE[1], SHAPE[2], 8]), same, assert_trivial=True)
        low, high = gl.expand_dims(low, 4), gl.expand_dims(high, 4)
    else:
        low = gl.convert_layout(low, each, assert_trivial=True)
        high = gl.convert_layout(high, each, assert_trivial=True)
    return gl.expand_dims(low, 4), gl.expand_dims(high, 4)


@gluon.jit
def multiply(total, ring, slot, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr):
    """Add to each warp's total [W, ROWS, TOKENS] the product of its columns of the step in `slot`."""
    W: gl.constexpr = total.shape[0]
    ROWS: gl.constexpr = total.shape[1]
    TOKENS: gl.constexpr = total.shape[2]
    BLOCKS: gl.constexpr = ROWS // 16
    COLUMNS: gl.constexpr = STEP * 64
    BOX: gl.constexpr = tokens_of(ring.x.type.shape)
    DTYPE: gl.constexpr = ring.x.dtype
    mma: gl.constexpr = total.type.layout
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    fragment: gl.constexpr = fragment_layout(W, BLOCKS, STEP)
    words = ring.words.index(slot).load(words_layout(W, BLOCKS, STEP))
    words = gl.permute(gl.reshape(words, [W, STEP, BLOCKS, 8, 4, 4]), (0, 2, 1, 3, 4, 5))
    words = gl.convert_layout(words, fragment, assert_trivial=True)
    x = reinterpret(ring.x, DTYPE, [BUFFERS, W * STEP, BOX, 64], TOKENS_VIEW)
    x = x.index(slot).load(tokens_layout(W, BOX, STEP))
    x = gl.reshape(gl.permute(gl.reshape(x, [W, STEP, BOX, 64]), (0, 1, 3, 2)), [W, COLUMNS, BOX])
    x = gl.convert_layout(x, right, assert_trivial=True)
    if BOX < TOKENS:  # a single token in all columns of the operand
        x = x.to(gl.int16, bitcast=True) + gl.zeros([W, COLUMNS, TOKENS], gl.int16, layout=right)
        x = x.to(DTYPE, bitcast=True)
    LATE: gl.constexpr = GROUP % COLUMNS == 0 and not HAS_ZERO  # scales on the sums, not on the weights
    TILES: gl.constexpr = 4 if GROUP % 64 == 0 else 1
    if LATE:
        weights = codes_of(words, DTYPE)
    else:
        scale, scale_8 = of_rows(stretches(ring.scales, slot, BUFFERS), TILES, fragment)
        if HAS_ZERO:
            zero, zero_8 = of_rows(stretches(ring.zeros, slot, BUFFERS), TILES, fragment)
            weights = shifted_weights_of(words, scale, scale_8, zero, zero_8, DTYPE)
        else:
            weights = weights_of(words, scale, scale_8, DTYPE)
    weights = gl.permute(weights, (0, 1, 7, 3, 2, 5, 8, 4, 6))  # W | block e g | step t j c neighbour
    weights = gl.reshape(weights, [W, ROWS, COLUMNS])
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
    if LATE:
        scale = values_of(stretches(ring.scales, slot, BUFFERS), W, W).to(gl.int16)
        scale = scale.to(DTYPE, bitcast=True).to(gl.float32)
        scale = gl.convert_layout(scale, gl.SliceLayout(2, mma), assert_trivial=True)
        product = mma_v2(weights, x, gl.zeros([W, ROWS, TOKENS], gl.float32, layout=mma))
        total += product * gl.expand_dims(scale, 2)
    else:
        total = mma_v2(weights, x, total)
    return total


@gluon.jit(
    do_not_specialize=["M", "eighths", "K", "stride", "column_blocks"],
    do_not_specialize_on_alignment=["bias_ptr"],
)
def decode_kernel(
    x_desc, words_desc, scale_ptr, zero_ptr, y_ptr, partial_ptr, bias_ptr, M, eighths, K, stride, column_blocks,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ZERO: gl.constexpr, STEP: gl.constexpr, BUFFERS: gl.constexpr,
    SPLITS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program: its rows × all tokens × one of SPLITS parts of K, in steps of STEP blocks a warp."""
    W: gl.constexpr = num_warps
    TOKENS: gl.constexpr = max(8, tokens_of(x_desc.block_type.shape))
    ROWS: gl.constexpr = 16 * words_desc.block_type.shape[1]
    ALL: gl.constexpr = STEP * W
    DTYPE: gl.constexpr = x_desc.dtype
    ring = ring_of(x_desc, words_desc, GROUP, HAS_ZERO, ALL, BUFFERS)
    release_successor()
    N, stride = eighths * 8, stride * 8  # so that the compiler knows that rows start at 16 bytes
    tile = gl.program_id(0)
    begin, end = range_of(column_blocks, gl.program_id(1), SPLITS, ALL)
    steps = gl.cdiv(end - begin, ALL)
    source = Source(x_desc, words_desc, scale_ptr, zero_ptr, N, K, stride, tile, 0, begin, steps)
    fill(ring, source, GROUP, HAS_ZERO, BUFFERS)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    total = gl.zeros([W, ROWS, TOKENS], gl.float32, layout=mma)
    for step in range(steps):
        slot = wait_for_step(ring, step, BUFFERS)
        total = multiply(total, ring, slot, GROUP, HAS_ZERO, STEP, BUFFERS)
        refill(ring, source, step, GROUP, HAS_ZERO, BUFFERS)

    shares = gl.allocate_shared_memory(gl.float32, [W, ROWS, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]))
    shares.store(total)
    if SPLITS > 1:
        sums: gl.constexpr = shares_layout(W, ROWS, TOKENS)
        row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(0, sums)))[:, None]
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(0, sums)))[None, :]
        part = (tile * SPLITS + gl.program_id(1)).to(gl.int64) * (ROWS * TOKENS)
        gl.store(partial_ptr + part + row * TOKENS + token, gl.sum(shares.load(sums), 0))
    else:
        out: gl.constexpr = shares_layout(W, TOKENS, ROWS)
        row = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(0, out)))[None, :]
        token = gl.arange(0, TOKENS, gl.SliceLayout(1, gl.SliceLayout(0, out)))[:, None]
        y = gl.sum(shares.permute((0, 2, 1)).load(out), 0)
        if HAS_BIAS:
            y += gl.load(bias_ptr + row, mask=row < N, other=0.0).to(gl.float32)
        gl.store(y_ptr + token * N + row, y.to(DTYPE), mask=(token < M) & (row < N))


launch_decode = Launcher(decode_kernel)


def decode(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, *,
    rows: int, tokens: int, warps: int, splits: int, step: int, buffers: int,
) -> Tensor:  # fmt: skip
    """x [M, K] · Ŵᵀ + bias → [M, N] for words [N/16, K/64, 128], scales and zero points [G, N] in kernel order.

    M is `tokens` (1, 8, 16 or 32) at most, a group has `group` columns, a multiple of 16. A program has `rows` (16 to
    128) rows and `warps` warps, each of them `step` blocks of 64 columns a step; `buffers` steps are in the ring.
    """
    outputs, columns = scale.shape[1], x.shape[1]
    y = x.new_empty(x.shape[0], outputs)
    programs, width = ceil_div(outputs, rows), max(8, tokens)
    partial = x.new_empty(programs * splits * rows * width, dtype=torch.float32) if splits > 1 else y
    args = (
        tokens_box(x, tokens, step * warps), words_box(words, rows, step * warps), scale,
        words if zero is None else zero, y, partial, x if bias is None else bias, x.shape[0], outputs // 8, columns,
        scale.stride(0) // 8, words.shape[1],
    )  # fmt: skip
    constants = {
        "GROUP": group, "HAS_BIAS": bias is not None, "HAS_ZERO": zero is not None, "STEP": step, "BUFFERS": buffers,
        "SPLITS": splits, "num_warps": warps,
    }  # fmt: skip
    launch_decode((programs, splits), x, args, constants, maxnreg=255)  # else ptxas may spill to fit one more program
    if splits > 1:
        reduce_tiles(partial, bias, y, programs, 0, rows=rows, tokens=width, splits=splits, raster=1)
    return y
