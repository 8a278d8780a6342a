"""The proof of a relayout: both formats' own formulas give the same weights."""

import torch

from formats.codec import Quantized, dequantize
from formats.errors import CheckpointError
from formats.interop.base import Layout, Parts
from formats.layout import CODES_PER_WORD, Scheme

BLOCK_WEIGHTS = 1 << 20  # of which the numbers on their way stay in a cache


def prove(
    layout: Layout, parts: Parts, matrix: Quantized, columns: int, scheme: Scheme, rows: range | None = None
) -> bool:
    """Compare all weights of `parts`, read by `layout`, with those of `matrix` of `scheme`, in fp32, exact in both.

    `parts` hold the `rows` of `matrix`, which follow one another, or all of them. Returns whether they are the same
    bit for bit, or else but for the sign of zeros, which codes at their zero point take from a negative scale. Raises
    `CheckpointError` for any other difference.
    """
    rows = range(len(matrix.scale)) if rows is None else rows
    step = max(1, BLOCK_WEIGHTS // (columns * CODES_PER_WORD)) * CODES_PER_WORD
    same_signs = True
    for start in range(0, len(rows), step):
        end = min(start + step, len(rows))
        found = layout.decode(parts, slice(start, end))
        skipped = (rows.start + start) % CODES_PER_WORD  # of the word of zero points that the first row is in
        near = matrix.rows(rows.start + start - skipped, rows.start + end, matrix.packed.device)
        expected = dequantize(near, columns, scheme)[skipped:]
        if not torch.equal(found, expected):
            wrong = int((found != expected).sum())
            raise CheckpointError(f"{wrong} weights differ in {layout.name} from rows {start} to {end}; report this")
        same_signs &= torch.equal(found.view(torch.int32), expected.view(torch.int32))
    return same_signs
