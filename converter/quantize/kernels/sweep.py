"""`converter.quantize.sweep.by_torch` as one kernel: a program keeps some rows in registers and walks their columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from converter.quantize.kernels.tiles import ROUND
from formats.layout import ceil_div

TILE_ROWS = 16


@triton.jit
def sweep_kernel(
    wanted_ptr, before_ptr, pull_ptr, scale_ptr, zero_ptr, lost_ptr,
    rows, columns, wanted_stride, before_stride, pull_stride,
    HAS_BEFORE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of a block of at most COLUMNS columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = row < rows
    places = wanted_ptr + (row[:, None].to(tl.int64) * wanted_stride + column[None, :])
    inside = exists[:, None] & (column < columns)[None, :]
    w = tl.load(places, mask=inside, other=0.0)
    for i in range(columns):
        own = tl.sum(tl.where(column[None, :] == i, w, 0.0), 1)
        scale = tl.load(scale_ptr + (i * rows + row), mask=exists, other=1.0)
        zero = tl.load(zero_ptr + (i * rows + row), mask=exists, other=0.0)
        level = (tl.clamp(tl.div_rn(own, scale), -8.0 - zero, 7.0 - zero) + ROUND) - ROUND
        value = level * scale
        if HAS_BEFORE:
            own = tl.load(before_ptr + (row.to(tl.int64) * before_stride + i), mask=exists, other=0.0)
        lost = own - value
        tl.store(lost_ptr + (i * rows + row), lost, mask=exists)
        pull = tl.load(pull_ptr + (i * pull_stride + column), mask=column < columns, other=0.0)
        w = tl.where(column[None, :] > i, w - lost[:, None] * pull[None, :], w)
        w = tl.where(column[None, :] == i, value[:, None], w)
    tl.store(places, w, mask=inside)


def sweep_block(wanted: Tensor, before: Tensor | None, pull: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`converter.quantize.sweep.sweep_block`; the rows of `wanted` and `before` are contiguous."""
    rows, columns = wanted.shape
    pull, scale, zero = pull.contiguous(), scale.contiguous(), zero.contiguous()
    lost = torch.empty_like(scale)
    earlier = wanted if before is None else before
    with torch.cuda.device_of(wanted):  # Triton launches on the current GPU, whichever holds the weight
        sweep_kernel[(ceil_div(rows, TILE_ROWS),)](
            wanted, earlier, pull, scale, zero, lost,
            rows, columns, wanted.stride(0), earlier.stride(0), pull.stride(0),
            before is not None, TILE_ROWS, triton.next_power_of_2(columns), enable_fp_fusion=False,
        )  # fmt: skip
    return lost
