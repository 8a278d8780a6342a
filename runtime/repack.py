"""The format's words ↔ the order of the Hopper kernels (`kernels.fragments`): nibbles change places, on the device."""

import torch
import triton
import triton.language as tl

from formats.codec import Quantized, pack_zero_point, unpack_zero_point
from formats.layout import CODE_MIN, CODES_PER_WORD, ceil_div

BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WORDS = 16, 64, 128  # of a block in kernel order
TILE = 1024
MAGIC = {torch.bfloat16: 0x4300, torch.float16: 0x6400}  # the bits of 128 and 1024


@triton.jit
def arrange_kernel(packed_ptr, words_ptr, rows, words, column_blocks, size, TILE: tl.constexpr):
    """One program: TILE words in kernel order, each gathered from four of the format's."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    place, block = at % 128, at // 128
    g, c, t = place // 16, place // 4 % 4, place % 4
    row = block // column_blocks * 16 + g
    word = block % column_blocks * 8 + 2 * t
    arranged = tl.zeros((TILE,), tl.int32)
    for i in tl.static_range(4):  # nibble i and its neighbour, i + 4: row + 8 for odd i, columns + 8 for i ≥ 2
        source_row, source_word = row + 8 * (i % 2), word + i // 2
        inside = (at < size) & (source_row < rows) & (source_word < words)
        source = tl.load(packed_ptr + source_row * words + source_word, mask=inside, other=-0x77777778)  # codes 0
        pair = source >> (8 * c).to(tl.int32)
        arranged |= ((pair & 0xF) << (4 * i)) | (((pair >> 4) & 0xF) << (16 + 4 * i))
    tl.store(words_ptr + at, arranged, mask=at < size)


@triton.jit
def restore_kernel(words_ptr, packed_ptr, words, column_blocks, size, TILE: tl.constexpr):
    """One program: TILE of the format's words, each gathered from four in kernel order."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row, word = at // words, at % words
    block = row // 16 * column_blocks + word // 8
    t, i = word % 8 // 2, word % 2 * 2 + row % 16 // 8
    packed = tl.zeros((TILE,), tl.int32)
    for c in tl.static_range(4):
        place = row % 8 * 16 + 4 * c + t
        arranged = tl.load(words_ptr + block * 128 + place, mask=at < size, other=0) >> (4 * i).to(tl.int32)
        packed |= ((arranged & 0xF) | ((arranged >> 12) & 0xF0)) << (8 * c)
    tl.store(packed_ptr + at, packed, mask=at < size)


def arrange(quantized: Quantized) -> Quantized:
    """The format's tensors → kernel order: words int32 [ceil(N/16), ceil(K/64), 128], scales and zero points [G, N].

    A zero point is the int16 with the bits of 128 (bf16) or 1024 (fp16) + its nibble, as the kernels compute with it.
    """
    packed = quantized.packed.contiguous()
    rows, words = packed.shape
    row_blocks, column_blocks = ceil_div(rows, BLOCK_ROWS), ceil_div(words * CODES_PER_WORD, BLOCK_COLUMNS)
    arranged = packed.new_empty(row_blocks, column_blocks, BLOCK_WORDS)
    with torch.cuda.device_of(packed):
        arrange_kernel[(ceil_div(arranged.numel(), TILE),)](
            packed, arranged, rows, words, column_blocks, arranged.numel(), TILE
        )
    zero = quantized.zero_point
    if zero is not None:
        nibbles = unpack_zero_point(zero, rows).T.to(torch.int16) - CODE_MIN
        zero = (nibbles | MAGIC[quantized.scale.dtype]).contiguous()
    return Quantized(arranged, quantized.scale.T.contiguous(), zero)


def restore(matrix: Quantized, columns: int) -> Quantized:
    """The inverse of `arrange` for a matrix of `columns` columns."""
    arranged = matrix.packed.contiguous()
    rows, words = matrix.scale.shape[1], ceil_div(columns, CODES_PER_WORD)
    packed = arranged.new_empty(rows, words)
    with torch.cuda.device_of(arranged):
        restore_kernel[(ceil_div(packed.numel(), TILE),)](
            arranged, packed, words, arranged.shape[1], packed.numel(), TILE
        )
    zero = matrix.zero_point
    if zero is not None:
        zero = pack_zero_point(((zero & 0xF) + CODE_MIN).to(torch.int8).T)
    return Quantized(packed, matrix.scale.T.contiguous(), zero)
