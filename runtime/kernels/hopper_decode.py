"""Few tokens on Hopper: every warp of a program takes its share of K, and the program adds the shares up at the end.

Nothing is shared between programs, so the same bits every run. The bytes of the weights decide the time: they go from
memory to registers in kernel order (see `fragments`), DEPTH steps ahead of their use, and the first steps do not wait
for the kernel before. One or two tokens go straight to the registers of the tensor cores too (RING = 0); more pass
through shared memory, a ring of RING steps, because a lane's elements lie apart in memory. In a step the warps
take neighbouring columns; where that reaches past K (TAIL), codes are 0 and the ring starts out as zeros.

Matrices with few rows are split along K among SPLITS programs; a second launch adds their sums in a fixed order.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from formats.layout import ceil_div
from runtime.kernels.copies import gather_to_shared
from runtime.kernels.fragments import (
    codes_of,
    release_successor,
    shifted_weights_of,
    wait_for_predecessor,
    weights_of,
)
from runtime.kernels.hopper_tiles import doublings, range_of, reduce_tiles
from runtime.kernels.launch import Launcher

ZERO_CODES = gl.constexpr(-0x77777778)  # a word of eight codes 0


@gluon.constexpr_function
def fragment_layout(warps, blocks, step):
    """Words [warps, blocks, step, g, c, t] as `fragments` draws them."""
    along = [[0, 0, b, 0, 0, 0] for b in doublings(1, step)]
    across = [[0, b, 0, 0, 0, 0] for b in doublings(1, blocks)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2], *along, *across],
        lane_bases=[[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0], [0, 0, 0, 4, 0, 0]],
        warp_bases=[[b, 0, 0, 0, 0, 0] for b in doublings(1, warps)], block_bases=[],
        shape=[warps, blocks, step, 8, 4, 4],
    )  # fmt: skip


@gluon.constexpr_function
def values_layout(warps, values):
    """One value for each row of the blocks of a warp and each stretch of its columns: [warps, values / 16, e, g]."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8], *([b] for b in doublings(16, values // 16))], lane_bases=[[0], [0], [1], [2], [4]],
        warp_bases=[[b] for b in doublings(values, warps)], block_bases=[], shape=[warps * values],
    )  # fmt: skip


@gluon.jit
def of_rows(values, FRAGMENT: gl.constexpr, SCALES: gl.constexpr):
    """Scales or zero points as loaded → int32, each value twice, of rows g and 8 + g, to meet the words."""
    SHAPE: gl.constexpr = FRAGMENT.shape
    both = gl.reshape(values.to(gl.int32) * 0x10001, [SHAPE[0], SHAPE[1], SHAPE[2], SCALES, 2, 8])
    low, high = gl.split(gl.permute(both, (0, 1, 2, 5, 3, 4)))  # warp block step g stretch
    each: gl.constexpr = gl.SliceLayout(4, FRAGMENT)
    if SCALES == 1:
        same: gl.constexpr = gl.SliceLayout(4, each)
        low = gl.convert_layout(gl.reshape(low, [SHAPE[0], SHAPE[1], SHAPE[2], 8]), same, assert_trivial=True)
        high = gl.convert_layout(gl.reshape(high, [SHAPE[0], SHAPE[1], SHAPE[2], 8]), same, assert_trivial=True)
        low, high = gl.expand_dims(low, 4), gl.expand_dims(high, 4)
    else:
        low = gl.convert_layout(low, each, assert_trivial=True)
        high = gl.convert_layout(high, each, assert_trivial=True)
    return gl.expand_dims(low, 4), gl.expand_dims(high, 4)


@gluon.jit
def fetch(
    words_at, values_at, scale_ptr, zero_ptr, step, steps, end, K, stride,
    LATE: gl.constexpr, HAS_ZERO: gl.constexpr, GROUP: gl.constexpr, STRIDE: gl.constexpr,
):  # fmt: skip
    """Words, scales and zero points of `step`; past the last step, and past `end`, codes or scales are 0."""
    words_at, block = words_at
    row, column = values_at
    inside = (block + step * STRIDE < end) & (step < steps)
    words = gl.load(words_at + step * (STRIDE * 128), mask=inside, other=ZERO_CODES)
    column += step * (STRIDE * 64)
    at = gl.minimum(column, K - 1) // GROUP * stride + row
    if LATE:
        scale = gl.load(scale_ptr + at)
        zero = scale
    else:
        inside = (column < end * 64) & (step < steps)
        scale = gl.load(scale_ptr.to(gl.pointer_type(gl.uint16), bitcast=True) + at, mask=inside, other=0)
        zero = scale
        if HAS_ZERO:
            zero = gl.load(zero_ptr + at, mask=inside, other=0)
    return words, scale, zero


@gluon.jit
def tokens_of(x_at, inside, column, step, steps, K, STRIDE: gl.constexpr, TAIL: gl.constexpr):
    """The tokens of `step`, or from the last one on those of the last, which meet codes 0."""
    ahead = gl.minimum(step, gl.maximum(steps - 1, 0)) * (STRIDE * 64)
    if TAIL:
        inside = inside & (column + ahead < K)
    return gl.load(x_at + ahead, mask=inside, other=0.0)


@gluon.jit
def bring_tokens(ring, x_at, inside, column, step, steps, K, STRIDE: gl.constexpr, TAIL: gl.constexpr):
    """Start to copy the tokens of `step`, if there is such a step, to their place in the ring."""
    inside = inside & (step < steps)
    if TAIL:
        inside = inside & (column + step * (STRIDE * 64) < K)
    gather_to_shared(ring.index(step % ring.type.shape[0]), x_at + step * (STRIDE * 64), mask=inside)
    async_copy.commit_group()


@gluon.jit(
    do_not_specialize=["M", "N", "stride", "eighths", "row_blocks", "column_blocks"],
    do_not_specialize_on_alignment=["bias_ptr", "zero_ptr"],
)
def decode_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, partial_ptr,
    M, N, stride, eighths, row_blocks, column_blocks,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ZERO: gl.constexpr, TAIL: gl.constexpr, ROWS: gl.constexpr,
    TOKENS: gl.constexpr, STEP: gl.constexpr, DEPTH: gl.constexpr, RING: gl.constexpr, SPLITS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """One program: ROWS rows × TOKENS tokens × one of SPLITS parts of K, in steps of STEP blocks a warp."""
    BLOCKS: gl.constexpr = ROWS // 16
    COLUMNS: gl.constexpr = STEP * 64
    W: gl.constexpr = num_warps
    STRIDE: gl.constexpr = STEP * W
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    fragment: gl.constexpr = fragment_layout(W, BLOCKS, STEP)
    SCALES: gl.constexpr = 1 if GROUP % 64 == 0 else 4
    LATE: gl.constexpr = GROUP % COLUMNS == 0 and not HAS_ZERO  # scales on the sums, not on the weights
    VALUES: gl.constexpr = ROWS * STEP * SCALES
    word_layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [W, 1, 1], [2, 1, 0])
    release_successor()
    K = eighths * 8  # so that the compiler knows that rows of x start at 16 bytes
    begin, end = range_of(column_blocks, gl.program_id(1), SPLITS, STEP)
    steps = gl.cdiv(end - begin, STRIDE)

    # words: [W, BLOCKS, STEP * 128]
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, word_layout)))[:, None, None]
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, word_layout)))[None, :, None]
    word = gl.arange(0, STEP * 128, gl.SliceLayout(0, gl.SliceLayout(1, word_layout)))[None, None, :]
    first_block = gl.program_id(0) * BLOCKS
    block = gl.minimum(block, row_blocks - 1 - first_block)
    words_ptr += (first_block.to(gl.int64) * column_blocks + begin) * 128
    words_at = (
        words_ptr + (block * column_blocks + warp * STEP) * 128 + word,
        begin + warp * STEP + word // 128,
    )

    # scales, zero points: rows and columns
    if LATE:
        warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
        row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :, None]
        column = begin * 64 + warp * COLUMNS
    else:
        place = gl.arange(0, W * VALUES, values_layout(W, VALUES))
        row = place // (16 * SCALES * STEP) % BLOCKS * 16 + place % 16
        column = begin * 64 + place // VALUES * COLUMNS + place // 16 % (SCALES * STEP) * (64 // SCALES)
    values_at = (gl.minimum(gl.program_id(0) * ROWS + row, N - 1), column)

    ahead = ()
    for i in gl.static_range(DEPTH):
        ahead += (
            fetch(words_at, values_at, scale_ptr, zero_ptr, i, steps, end, K, stride, LATE, HAS_ZERO, GROUP, STRIDE),
        )

    # tokens: [W, TOKENS, COLUMNS] or, where the tensor cores take them, [W, COLUMNS, TOKENS]
    if RING:
        x_layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // COLUMNS, COLUMNS // 8], [W, 1, 1], [2, 1, 0])
        warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, x_layout)))[:, None, None]
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, x_layout)))[None, :, None]
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, x_layout)))[None, None, :]
        ring_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[2, 1, 0])
        ring = gl.allocate_shared_memory(DTYPE, [RING, W, TOKENS, COLUMNS], ring_layout)
        for i in gl.static_range(RING):
            if TAIL:
                ring.index(i).store(gl.zeros([W, TOKENS, COLUMNS], DTYPE, layout=x_layout))
    else:
        warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, right)))[:, None, None]
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :, None]
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, None, :]
    column += begin * 64 + warp * COLUMNS
    x_at = x_ptr + token * K + column
    present = token < M
    wait_for_predecessor()
    tokens = ()
    if RING:
        for i in gl.static_range(RING - 1):
            bring_tokens(ring, x_at, present, column, i, steps, K, STRIDE, TAIL)
    else:
        for i in gl.static_range(DEPTH):
            tokens += (tokens_of(x_at, present, column, i, steps, K, STRIDE, TAIL),)

    total = gl.zeros([W, ROWS, TOKENS], gl.float32, layout=mma)
    # Every slot of `ahead` keeps its registers: to hand words on from one name to the next would wait for them.
    for turn in range(0, steps, DEPTH):
        for i in gl.static_range(DEPTH):
            words, scale, zero = ahead[i]
            words = gl.convert_layout(gl.reshape(words, [W, BLOCKS, STEP, 8, 4, 4]), fragment, assert_trivial=True)
            if LATE:
                weights = codes_of(words, DTYPE)
            else:
                scale, scale_8 = of_rows(scale, fragment, SCALES)
                if HAS_ZERO:
                    zero, zero_8 = of_rows(zero, fragment, SCALES)
                    weights = shifted_weights_of(words, scale, scale_8, zero, zero_8, DTYPE)
                else:
                    weights = weights_of(words, scale, scale_8, DTYPE)
            weights = gl.permute(weights, (0, 1, 7, 3, 2, 5, 8, 4, 6))  # W | block e g | step t j c neighbour
            weights = gl.convert_layout(gl.reshape(weights, [W, ROWS, COLUMNS]), left, assert_trivial=True)
            if RING:
                async_copy.wait_group(RING - 2)
                x = ring.index((turn + i) % RING).permute((0, 2, 1)).load(right)
            else:
                x = tokens[i]
            if LATE:
                product = mma_v2(weights, x, gl.zeros([W, ROWS, TOKENS], gl.float32, layout=mma))
                total += product * scale.to(gl.float32)
            else:
                total = mma_v2(weights, x, total)
            late = turn + i + DEPTH
            fetched = fetch(
                words_at, values_at, scale_ptr, zero_ptr, late, steps, end, K, stride, LATE, HAS_ZERO, GROUP, STRIDE
            )
            ahead = ahead[:i] + (fetched,) + ahead[i + 1 :]
            if RING:
                bring_tokens(ring, x_at, present, column, turn + i + RING - 1, steps, K, STRIDE, TAIL)
            else:
                x_late = tokens_of(x_at, present, column, late, steps, K, STRIDE, TAIL)
                tokens = tokens[:i] + (x_late,) + tokens[i + 1 :]
    if RING:
        async_copy.wait_group(0)

    y = gl.sum(total, 0)
    out: gl.constexpr = gl.SliceLayout(0, mma)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, out))[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, out))[None, :]
    if SPLITS > 1:
        part = (gl.program_id(0) * SPLITS + gl.program_id(1)).to(gl.int64) * (ROWS * TOKENS)
        gl.store(partial_ptr + part + row * TOKENS + token, y)
    else:
        row += gl.program_id(0) * ROWS
        if HAS_BIAS:
            y += gl.load(bias_ptr + row, mask=row < N, other=0.0).to(gl.float32)
        gl.store(y_ptr + token * N + row, y.to(DTYPE), mask=(token < M) & (row < N))


launch_decode = Launcher(decode_kernel)


def decode(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int, *,
    rows: int, warps: int, step: int, depth: int, ring: int, splits: int, registers: int,
) -> Tensor:  # fmt: skip
    """x [M ≤ 16, K] · Ŵᵀ + bias → [M, N] for words [N/16, K/64, 128], scales and zero points [G, N] in kernel order.

    A group has `group` columns, a multiple of 16; `rows` (16 to 128), `warps`, `step`, `depth`, `ring`, `splits` and
    `registers` (of a thread, at most) shape the programs.
    """
    columns, outputs = x.shape[1], scale.shape[1]
    y = x.new_empty(x.shape[0], outputs)
    width = 8 if x.shape[0] <= 8 else 16
    programs = ceil_div(outputs, rows)
    partial = x.new_empty(programs * splits * rows * width, dtype=torch.float32) if splits > 1 else y
    args = (
        x, words, scale, words if zero is None else zero, x if bias is None else bias, y, partial, *y.shape,
        scale.stride(0),
        columns // 8, *words.shape[:2],
    )  # fmt: skip
    constants = {
        "GROUP": group, "HAS_BIAS": bias is not None, "HAS_ZERO": zero is not None,
        "TAIL": splits > 1 or columns % (64 * step * warps) != 0, "ROWS": rows, "TOKENS": width, "STEP": step,
        "DEPTH": depth, "RING": ring, "SPLITS": splits, "num_warps": warps,
    }  # fmt: skip
    launch_decode((programs, splits), x, args, constants, maxnreg=registers)
    if splits > 1:
        reduce_tiles(partial, bias, y, programs, 0, rows=rows, tokens=width, splits=splits, raster=1)
    return y
