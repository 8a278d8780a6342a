"""Scales that lose least without any data: in each group the best of many candidates, each refitted to its codes."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.codec import Quantized, absmax, as_stored, check_finite, encoded, grouped
from formats.layout import CODE_MAX, CODE_MIN, Scheme

STEPS = 40
RATIOS = tuple(0.6 + 0.5 * step / (STEPS - 1) for step in range(STEPS))  # of a scale to that of the whole range
BLOCK_WEIGHTS = {"cpu": 1 << 16, "cuda": 1 << 24}  # looked at together: what a cache holds, what fills a GPU


def search(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Quantise `weight` [N, K] by scales, and zero points, that make Σ (σ + |w|) · (w − ŵ)² of each group least.

    σ² is the mean of w² in the group: large weights count more, but not by their square. The candidates are those of
    llama.cpp's searches (`make_qx_quants`, `make_qkx3_quants`). Without zero points: scales of either sign, by which
    the largest weight has code −8 or 8 times a ratio, and first of all signed max / −8. With zero points: the range
    times a ratio, the zero where min–max has it or beside it, and first of all min–max. Each gives codes, and these the
    scale of least squares, as it is stored. Sums are taken in a fixed order, so that every device finds the same.

    Raises `NonFiniteError` on NaN or infinity.
    """
    check_finite(weight)
    weight = weight.float()
    groups = grouped(weight, scheme)
    width = groups.shape[-1]
    columns = torch.full((groups.shape[1], 1), width, device=weight.device)
    columns[-1] = weight.shape[1] - (groups.shape[1] - 1) * width
    columns = columns.expand(*groups.shape[:2], 1).reshape(-1, 1)
    rows = F.pad(groups.flatten(0, 1), (0, (1 << (width - 1).bit_length()) - width))
    block = max(1, BLOCK_WEIGHTS[weight.device.type] // rows.shape[1])
    parts = zip(torch.split(rows, block), torch.split(columns, block), strict=True)
    found = [_best(part, count, scheme.symmetric, scale_dtype) for part, count in parts]
    scale = torch.cat([scale for scale, _ in found]).to(scale_dtype).view(groups.shape[:2])
    zero = torch.cat([zero for _, zero in found]).to(torch.int8).view(groups.shape[:2])
    return encoded(weight, scale, None if scheme.symmetric else zero, scheme)


def _best(w: Tensor, columns: Tensor, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales, as stored, and zero points, fp32 [B, 1], of groups w [B, a power of two].

    So many `columns` [B, 1] of each group count, the rest is 0.
    """
    importance = (_sum(w * w) / columns).sqrt() + w.abs()
    weighted = importance * w
    candidates = _signed(w) if symmetric else _ranges(w, scale_dtype)
    first, best_zero = next(candidates)
    best = as_stored(first, scale_dtype).float()
    least = _error(w, importance, best, best_zero)
    for start, zero in candidates:
        levels = _levels(w, start, zero)
        fitted = _sum(weighted * levels) / _sum(importance * levels * levels)
        scale = as_stored(torch.where(fitted.isfinite() & (fitted != 0), fitted, first), scale_dtype).float()
        error = _error(w, importance, scale, zero)
        better = error < least
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
        least = torch.where(better, error, least)
    return best, best_zero


def _signed(w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales of both signs that bring the largest weight near code −8 or 8, without zero points."""
    largest = w.gather(1, w.abs().argmax(1, keepdim=True))
    base = largest / CODE_MIN
    zero = torch.zeros_like(base)
    yield base, zero
    for sign in (1, -1):
        for ratio in RATIOS:
            yield base * (sign * ratio), zero


def _ranges(w: Tensor, scale_dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The scale and zero point of min–max, and narrower and wider ones with zero points around it."""
    base, zero = (
        tensor.float() for tensor in absmax(w, Scheme(-1, symmetric=False), scale_dtype) if tensor is not None
    )
    yield base, zero
    for shift in (0, -1, 1):
        for ratio in RATIOS:
            yield base * ratio, (zero + shift).clamp(CODE_MIN, CODE_MAX)


def _levels(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes less the zero point, by which the scale is multiplied."""
    return (w / scale).round_().add_(zero).clamp_(CODE_MIN, CODE_MAX).sub_(zero)


def _error(w: Tensor, importance: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Σ importance · (w − ŵ)² of each group, [B, 1]."""
    difference = _levels(w, scale, zero).mul_(scale).sub_(w)
    return _sum(difference.mul_(difference).mul_(importance))


def _sum(x: Tensor) -> Tensor:
    """Sums [B, 1] of x [B, a power of two], by halves: the same bits on every device."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x
