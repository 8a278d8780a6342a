"""Scales that lose least without any data: in each group the best of many candidates, the last fitted to its codes."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.codec import Quantized, absmax, as_stored, check_finite, encoded, grouped
from formats.devices import block_weights, has_triton
from formats.layout import CODE_MAX, CODE_MIN, CODES_PER_WORD, Scheme, ceil_div

COARSE = range(38, 72, 3)  # ratios of a scale to that of the whole range, in 64ths
FINE = range(125, 132)  # and to the best of those, in 128ths: exact in fp32, as the kernel makes them
SIGNS, SHIFTS = (1.0, -1.0), (0.0, -1.0, 1.0)  # of the scale; of the zero point
GROUP_LANES = 4  # of a GPU for a group, at least: 64 bytes of 16-bit weights, side by side
MOST_LANES = {2: 256, 4: 64}  # by the bytes of a weight: with more, registers spill and compiling takes minutes
LANE_WORDS = 8  # for each of them, on their way at once

Sum = Callable[[Tensor], Tensor]


def search(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Quantise `weight` [N, K] by scales, and zero points, that make Σ (σ + |w|) · (w − ŵ)² of each group least.

    σ² is the mean of w² in the group: large weights count more, but not by their square. Candidates are, as in
    llama.cpp's searches (`make_qx_quants`, `make_qkx3_quants`): without zero points scales of either sign, by which the
    largest weight has code −8 or 8 times a ratio; with them the range times a ratio, the zero where min–max has it or
    beside it. Signed max / −8, or min–max, comes first. Scales near the best of them then give codes, and these the
    scale of least squares, as it is stored. One kernel on a GPU, and torch elsewhere and for very long groups, find the
    same, bit for bit.

    Raises `NonFiniteError` on NaN or infinity.
    """
    if has_triton(weight.device) and lanes_of(padded_words(weight, scheme)) <= MOST_LANES[weight.element_size()]:
        from converter.quantize import kernels

        return kernels.search(weight, scheme, scale_dtype)
    return by_torch(weight, scheme, scale_dtype)


def by_torch(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """`search` in plain torch, on any device."""
    check_finite(weight)
    weight = weight.float()
    scale, zero = best_scales(weight, scheme, scale_dtype)
    return encoded(weight, scale, None if scheme.symmetric else zero, scheme)


def padded_words(weight: Tensor, scheme: Scheme) -> int:
    """Words of a group, up to a power of two."""
    return 1 << (ceil_div(scheme.group_width(weight.shape[1]), CODES_PER_WORD) - 1).bit_length()


def lanes_of(words: int) -> int:
    """How many lanes of a GPU share `words`, a power of two, of a group: `summer` adds as they do."""
    return max(min(words, GROUP_LANES), words // LANE_WORDS)


def best_scales(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales [N, G], as stored, and zero points int8 [N, G] of `weight` fp32 [N, K].

    The squared errors count by `importance` [K] of their columns where it is given, and else by σ + |w|.
    """
    groups = grouped(weight, scheme)
    width = groups.shape[-1]
    columns = torch.full((groups.shape[1], 1), width, device=weight.device)
    columns[-1] = weight.shape[1] - (groups.shape[1] - 1) * width
    columns = columns.expand(*groups.shape[:2], 1).reshape(-1, 1)
    padding = (0, CODES_PER_WORD * padded_words(weight, scheme) - width)
    rows = F.pad(groups.flatten(0, 1), padding)
    block = max(1, block_weights(weight.device) // rows.shape[1])
    if importance is None:
        counts = zip(torch.split(rows, block), torch.split(columns, block), strict=True)
        weighed = ((part, _by_size(part, count)) for part, count in counts)
    else:
        shares = F.pad(grouped(importance.unsqueeze(0), scheme)[0], padding)
        block = max(len(shares), block // len(shares) * len(shares))  # whole rows of the matrix
        weighed = ((part, shares.repeat(len(part) // len(shares), 1)) for part in torch.split(rows, block))
    found = [_best(part, shares, scheme.symmetric, scale_dtype) for part, shares in weighed]
    scale = torch.cat([scale for scale, _ in found]).to(scale_dtype).view(groups.shape[:2])
    return scale, torch.cat([zero for _, zero in found]).to(torch.int8).view(groups.shape[:2])


def _by_size(w: Tensor, columns: Tensor) -> Tensor:
    """σ + |w| of groups w [B, a power of two], of which so many `columns` [B, 1] count and the rest is 0."""
    mean = summer(w.shape[1])(w * w) / columns
    # By fp64, because torch's square root in fp32 is not always the nearest number (AVX-512).
    return mean.double().sqrt().float() + w.abs()


def _best(w: Tensor, importance: Tensor, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales, as stored, and zero points, fp32 [B, 1], of groups w [B, a power of two], filled up with zeros."""
    total = summer(w.shape[1])

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        difference = _levels(w, scale, zero).mul_(scale).sub_(w)
        return total(difference.mul_(difference).mul_(importance))

    def stored(scale: Tensor) -> Tensor:
        return as_stored(scale, scale_dtype).float()

    candidates = _signed(w) if symmetric else _ranges(w, scale_dtype)
    first, best_zero = next(candidates)
    best = stored(first)
    least = error(best, best_zero)
    for start, zero in candidates:
        scale = stored(start)
        found = error(scale, zero)
        better = found < least
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
        least = torch.where(better, found, least)
    near, zero = best, best_zero
    for ratio in FINE:
        levels = _levels(w, near * (ratio / 128), zero)
        weighted = importance * levels
        fitted = total(weighted * w) / total(weighted.mul_(levels))
        scale = stored(torch.where(fitted.isfinite() & (fitted != 0), fitted, near))
        found = error(scale, zero)
        better = found < least
        best, least = torch.where(better, scale, best), torch.where(better, found, least)
    return best, best_zero


def _signed(w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales of both signs that bring the largest weight near code −8 or 8, without zero points."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    base = torch.where(high >= -low, high, low) / CODE_MIN
    zero = torch.zeros_like(base)
    yield base, zero
    for sign in SIGNS:
        for ratio in COARSE:
            yield base * (sign * ratio / 64), zero


def _ranges(w: Tensor, scale_dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The scale and zero point of min–max, and narrower and wider ones with zero points around it."""
    base, zero = (
        tensor.float() for tensor in absmax(w, Scheme(-1, symmetric=False), scale_dtype) if tensor is not None
    )
    yield base, zero
    for shift in SHIFTS:
        for ratio in COARSE:
            yield base * (ratio / 64), (zero + shift).clamp(CODE_MIN, CODE_MAX)


def _levels(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes less the zero point, by which the scale is multiplied; near a half perhaps not those of the codec."""
    return (w * (1 / scale)).round_().add_(zero).clamp_(CODE_MIN, CODE_MAX).sub_(zero)


def summer(width: int) -> Sum:
    """Sums [B, 1] of x [B, width], in one order on every device: that in which the lanes of a GPU come together.

    Each lane has a word here and there: those are added first, one after the other, then by halves a word's eight and
    the lanes.
    """
    lanes = lanes_of(width // CODES_PER_WORD)

    def total(x: Tensor) -> Tensor:
        turns = x.view(len(x), -1, lanes * CODES_PER_WORD)
        x = turns[:, 0]
        for turn in range(1, turns.shape[1]):
            x = x + turns[:, turn]
        return _halves(_halves(x.reshape(len(x), lanes, CODES_PER_WORD))).unsqueeze(1)

    return total


def _halves(x: Tensor) -> Tensor:
    """The last dimension of x, a power of two, added up by halves."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)
