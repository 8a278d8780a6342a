"""Few tokens on Hopper: every warp of a program takes a slice of K, and the program adds the slices up at the end.

One launch, nothing shared between programs, so the same bits every run. The bytes of the weights decide the time:
they go from memory to registers in kernel order (see `fragments`), one step ahead of their use, and the first step does
not wait for the kernel before. The tokens pass through shared memory, a ring of BUFFERS steps. Where the slices of the
warps reach past K (TAIL), codes are 0 and the ring starts out as zeros, so that nothing is added there.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from runtime.kernels.copies import gather_to_shared
from runtime.kernels.fragments import codes_of, release_successor, wait_for_predecessor

STEP_BLOCKS = 2  # blocks of 64 columns in a step, where a group of scales is that wide
ZERO_CODES = gl.constexpr(-0x77777778)  # a word of eight codes 0


@gluon.jit(do_not_specialize=["M"])
def decode_kernel(
    x_ptr, words_ptr, scale_ptr, bias_ptr, y_ptr, M, N, eighths, row_blocks, column_blocks,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, TAIL: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr,
    STEP: gl.constexpr, BUFFERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program: ROWS rows × TOKENS tokens × all of K, in steps of STEP blocks a warp."""
    BLOCKS: gl.constexpr = ROWS // 16
    COLUMNS: gl.constexpr = STEP * 64
    W: gl.constexpr = num_warps
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    word_layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [W, 1, 1], [2, 1, 0])
    x_layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // COLUMNS, COLUMNS // 8], [W, 1, 1], [2, 1, 0])
    release_successor()
    K = eighths * 8  # so that the compiler knows that rows of x start at 16 bytes
    steps = gl.cdiv(gl.cdiv(column_blocks, STEP), W)

    # words: [W, BLOCKS, STEP * 128]
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, word_layout)))[:, None, None]
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, word_layout)))[None, :, None]
    word = gl.arange(0, STEP * 128, gl.SliceLayout(0, gl.SliceLayout(1, word_layout)))[None, None, :]
    first_block = gl.program_id(0) * BLOCKS
    block = gl.minimum(block, row_blocks - 1 - first_block)
    column_block = warp * steps * STEP + word // 128
    words_ptr += first_block.to(gl.int64) * column_blocks * 128
    words_at = words_ptr + (block * column_blocks + warp * steps * STEP) * 128 + word

    # scales: [W, ROWS, 1], on the accumulator
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, mma)))[None, :, None]
    first_column = warp * steps * COLUMNS
    scales_at = scale_ptr + gl.minimum(gl.program_id(0) * ROWS + row, N - 1)

    # tokens: [W, TOKENS, COLUMNS]
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, x_layout)))[:, None, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, x_layout)))[None, :, None]
    column = (
        warp * steps * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, x_layout)))[None, None, :]
    )
    x_at = x_ptr + token * K + column
    ring_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[2, 1, 0])
    ring = gl.allocate_shared_memory(DTYPE, [BUFFERS, W, TOKENS, COLUMNS], ring_layout)
    if TAIL:
        for i in gl.static_range(BUFFERS):
            ring.index(i).store(gl.zeros([W, TOKENS, COLUMNS], DTYPE, layout=x_layout))

    next_words = gl.load(words_at, mask=column_block < column_blocks, other=ZERO_CODES)
    next_scale = gl.load(scales_at + gl.minimum(first_column, K - 1) // GROUP * N)
    wait_for_predecessor()
    for ahead in gl.static_range(BUFFERS - 1):
        inside = (token < M) & (column + ahead * COLUMNS < K) & (ahead < steps)
        gather_to_shared(ring.index(ahead), x_at + ahead * COLUMNS, mask=inside)
        async_copy.commit_group()
    total = gl.zeros([W, ROWS, TOKENS], gl.float32, layout=mma)
    for step in range(steps):
        words, scale = next_words, next_scale.to(gl.float32)
        after = step + 1
        inside = (column_block + after * STEP < column_blocks) & (after < steps)
        next_words = gl.load(words_at + after * (STEP * 128), mask=inside, other=ZERO_CODES)
        next_scale = gl.load(scales_at + gl.minimum(first_column + after * COLUMNS, K - 1) // GROUP * N)
        async_copy.wait_group(BUFFERS - 2)
        codes = codes_of(gl.reshape(words, [W, BLOCKS, STEP, 8, 4, 4]), DTYPE)  # W block step g c t · neighbour e j
        codes = gl.permute(codes, (0, 1, 7, 3, 2, 5, 8, 4, 6))  # W | block e g | step t j c neighbour
        codes = gl.convert_layout(gl.reshape(codes, [W, ROWS, COLUMNS]), left, assert_trivial=True)
        x = ring.index(step % BUFFERS).permute((0, 2, 1)).load(right)
        total += mma_v2(codes, x, gl.zeros([W, ROWS, TOKENS], gl.float32, layout=mma)) * scale
        late = step + BUFFERS - 1
        inside = (token < M) & (column + late * COLUMNS < K) & (late < steps)
        gather_to_shared(ring.index(late % BUFFERS), x_at + late * COLUMNS, mask=inside)
        async_copy.commit_group()
    async_copy.wait_group(0)

    y = gl.sum(total, 0)
    out: gl.constexpr = gl.SliceLayout(0, mma)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, out))[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, out))[None, :]
    if HAS_BIAS:
        y += gl.load(bias_ptr + row, mask=row < N, other=0.0).to(gl.float32)
    gl.store(y_ptr + token * N + row, y.to(DTYPE), mask=(token < M) & (row < N))


def decode(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, group: int, *, rows: int, warps: int, buffers: int
) -> Tensor:
    """x [M ≤ 16, K] · Ŵᵀ + bias → [M, N] for words [N/16, K/64, 128] and scales [G, N] in kernel order.

    A group has `group` columns, a multiple of 64; `rows` (16, 32 or 64), `warps` and `buffers` shape the program.
    """
    tokens, columns = x.shape
    outputs = scale.shape[1]
    y = x.new_empty(tokens, outputs)
    step = STEP_BLOCKS if group % (64 * STEP_BLOCKS) == 0 else 1
    with torch.cuda.device_of(x):
        decode_kernel[(triton.cdiv(outputs, rows),)](
            x, words, scale, x if bias is None else bias, y, tokens, outputs, columns // 8, *words.shape[:2],
            GROUP=group, HAS_BIAS=bias is not None, TAIL=columns % (64 * step * warps) != 0, ROWS=rows,
            TOKENS=8 if tokens <= 8 else 16, STEP=step, BUFFERS=buffers, num_warps=warps, launch_pdl=True,
        )  # fmt: skip
    return y
