"""Scales that lose least without any data: in each group the best of signed candidates, each refitted to its codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.codec import MIN_SCALE, Quantized, check_finite, encode, grouped, pack
from formats.layout import CODE_MAX, CODE_MIN, Scheme

STEPS = 40
RATIOS = tuple(0.6 + 0.5 * step / (STEPS - 1) for step in range(STEPS))  # of a scale to that of the largest weight
BLOCK_WEIGHTS = {"cpu": 1 << 16, "cuda": 1 << 24}  # looked at together: what a cache holds, what fills a GPU


def search(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Quantise `weight` [N, K] without zero points, by scales [N, G] that make Σ (σ + |w|) · (w − ŵ)² of a group least.

    σ² is the mean of w² in the group: large weights count more, but not by their square. The candidates are those of
    llama.cpp's searches (`make_qx_quants`): scales of either sign, by which the largest weight has code −8 or 8 times
    a ratio; codes, then the scale of least squares for these codes, as it is stored. The first is signed max / −8.
    Sums are taken in a fixed order, so that every device finds the same.

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
    scale = torch.cat([_best(part, count, scale_dtype) for part, count in parts]).view(groups.shape[:2])
    return Quantized(pack(encode(weight, scale, None, scheme)), scale, None)


def _best(w: Tensor, columns: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales [B], as stored, of groups w [B, a power of two] of which so many `columns` [B, 1] count, the rest is 0."""
    sigma = (_sum(w * w) / columns).sqrt()
    importance = sigma + w.abs()
    largest = w.gather(1, w.abs().argmax(1, keepdim=True))
    base = torch.where(largest == 0, torch.ones_like(largest), largest / CODE_MIN)
    best = _as_stored(base, scale_dtype)
    least = _error(w, importance, best)
    weighted = importance * w
    for sign in (1, -1):
        for ratio in RATIOS:
            codes = (w / (base * (sign * ratio))).round_().clamp_(CODE_MIN, CODE_MAX)
            fitted = _sum(weighted * codes) / _sum(importance * codes * codes)
            scale = _as_stored(torch.where(fitted.isfinite() & (fitted != 0), fitted, base), scale_dtype)
            error = _error(w, importance, scale)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.to(scale_dtype).squeeze(1)


def _error(w: Tensor, importance: Tensor, scale: Tensor) -> Tensor:
    """Σ importance · (w − code · scale)² of each group, [B, 1]."""
    difference = (w / scale).round_().clamp_(CODE_MIN, CODE_MAX).mul_(scale).sub_(w)
    return _sum(difference.mul_(difference).mul_(importance))


def _sum(x: Tensor) -> Tensor:
    """Sums [B, 1] of x [B, a power of two], by halves: the same bits on every device."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x


def _as_stored(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales as fp32 of the values that `scale_dtype` stores: not 0."""
    rounded = scale.to(scale_dtype).float()
    smallest = MIN_SCALE[scale_dtype]
    return torch.where(rounded.abs() < smallest, torch.copysign(torch.full_like(rounded, smallest), scale), rounded)
