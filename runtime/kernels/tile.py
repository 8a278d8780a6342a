"""The body that the matmul kernels share: one tile of W · Xᵀ, straight from the format's words."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from formats.codec import Quantized
from formats.layout import Scheme

BLOCK_K = (128, 64, 32)  # tried in this order: a tile within one group takes a single scale a row


@triton.jit
def tile_product(
    x_ptr, row, token, begin, end, M,
    packed_ptr, scale_ptr, zero_ptr, N, K, words, groups, width,
    SYMMETRIC: tl.constexpr, ONE_SCALE: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ Ŵ[row, k] · x[token, k] over k in [begin, end) as fp32 [BLOCK_N, BLOCK_M]; 0 outside the matrices.

    Weights are the left operand, so that tensor cores can take them from registers. With ONE_SCALE a step of BLOCK_K
    columns lies in one group: codes go to the tensor cores exactly as integers, and the scale onto their sum. With
    QUADS a row has a multiple of four words: said so, Triton loads 16 bytes at a time.
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    pitch = words // 4 * 4 if QUADS else words
    row_words = packed_ptr + row.to(tl.int64)[:, None] * pitch
    row_scales = scale_ptr + row.to(tl.int64) * groups
    zero_shift = (row % 8) * 4
    row_zeros = zero_ptr + (row // 8).to(tl.int64) * groups
    token_x = x_ptr + token.to(tl.int64)[None, :] * K
    for k in range(begin, end, BLOCK_K):
        word = k // 8 + tl.arange(0, WORDS)
        column = k + tl.arange(0, BLOCK_K)
        packed = tl.load(row_words + word[None, :], mask=(row < N)[:, None] & (word < pitch)[None, :], other=0)
        code = (packed[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 0xF
        code = tl.reshape(code, (BLOCK_N, BLOCK_K)) - 8
        # Columns past K meet an x of 0, whatever their code.
        x = tl.load(token_x + column[:, None], mask=(token < M)[None, :] & (column < K)[:, None], other=0.0)
        if ONE_SCALE:
            group = k // width
            scale = tl.load(row_scales + group, mask=row < N, other=0.0).to(tl.float32)
            if not SYMMETRIC:
                zero = tl.load(row_zeros + group, mask=row < N, other=0)
                code -= (((zero >> zero_shift) & 0xF) - 8)[:, None]
            total += tl.dot(code.to(x.dtype), x, input_precision="ieee") * scale[:, None]
        else:
            group = column // width
            inside = (row < N)[:, None] & (column < K)[None, :]
            scale = tl.load(row_scales[:, None] + group[None, :], mask=inside, other=0.0).to(tl.float32)
            if not SYMMETRIC:
                zero = tl.load(row_zeros[:, None] + group[None, :], mask=inside, other=0)
                code -= ((zero >> zero_shift[:, None]) & 0xF) - 8
            total = tl.dot((code * scale).to(x.dtype), x, total, input_precision="ieee")
    return total


def weight_arguments(
    quantized: Quantized, columns: int, scheme: Scheme
) -> tuple[tuple[Tensor | int, ...], dict[str, Any]]:
    """What every kernel takes of a quantised matrix: pointers and sizes in order, and constants by name."""
    rows, words = quantized.packed.shape
    width, groups = scheme.group_width(columns), scheme.groups(columns)
    zero_point = quantized.packed if quantized.zero_point is None else quantized.zero_point  # unused when symmetric
    fitting = [block for block in BLOCK_K if groups == 1 or width % block == 0]
    constants = {
        "SYMMETRIC": scheme.symmetric,
        "ONE_SCALE": bool(fitting),
        "QUADS": words % 4 == 0,
        "BLOCK_K": fitting[0] if fitting else BLOCK_K[-1],
    }
    return (quantized.packed, quantized.scale, zero_point, rows, columns, words, groups, width), constants
