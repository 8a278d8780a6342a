"""Columns one after the other: each takes the nearest value that it can have, those behind make up for what it lost."""

from collections.abc import Callable

from torch import Tensor

from formats.devices import has_triton
from formats.layout import CODE_MAX, CODE_MIN

BLOCK_COLUMNS = 128  # whose losses reach the columns behind them as one product


def sweep(
    wanted: Tensor,
    before: Tensor | None,
    pull: Callable[[int, int], Tensor],
    scale: Tensor,
    zero: Tensor,
    groups: Tensor,
) -> Tensor:
    """Values (code − zero) · scale [N, K] for `wanted` fp32 [N, K], whose memory they may take.

    A column loses its `before`, or else what was wanted of it by then, less its value. Of every column behind it so
    much less is wanted as it lost times their pull: `pull(i, j)` [j − i, K − i] is that of columns i to j on
    themselves and on all behind them. `scale` and `zero` fp32 [G, N] are of groups, `groups` int64 [K] says of which.
    """
    columns = wanted.shape[1]
    wanted, before = wanted.contiguous(), None if before is None else before.contiguous()
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        own, pulls = groups[start:end], pull(start, end)
        earlier = None if before is None else before[:, start:end]
        lost = sweep_block(wanted[:, start:end], earlier, pulls[:, : end - start], scale[own], zero[own])
        wanted[:, end:] -= lost.T @ pulls[:, end - start :]
    return wanted


def sweep_block(wanted: Tensor, before: Tensor | None, pull: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`sweep` of a block of B columns, in place; `pull` [B, B], `scale` and `zero` [B, N]. What they lost, [B, N].

    One kernel on a GPU and torch elsewhere, with the same bits.
    """
    if has_triton(wanted.device):
        from converter.quantize.kernels.sweep import sweep_block as by_triton

        return by_triton(wanted, before, pull, scale, zero)
    return by_torch(wanted, before, pull, scale, zero)


def by_torch(wanted: Tensor, before: Tensor | None, pull: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`sweep_block` in plain torch, on any device."""
    values = wanted.T.contiguous()
    lost = values.clone() if before is None else before.T.contiguous()
    for i in range(len(values)):
        if before is None:
            lost[i] = values[i]
        values[i] = nearest(values[i], scale[i], zero[i])
        lost[i] -= values[i]
        values[i + 1 :] -= pull[i, i + 1 :].unsqueeze(1) * lost[i]
    wanted.copy_(values.T)
    return lost


def nearest(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The value (code − zero) · scale nearest to each of w."""
    return ((w / scale).round().add_(zero).clamp_(CODE_MIN, CODE_MAX) - zero) * scale
