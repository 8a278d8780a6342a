"""GPTQ: codes that make up for each other, column by column, in what they do to the inputs of calibration.

The weight is first moved to what serves the inputs best that it will get from quantised layers before it (the mismatch
correction of GPTAQ and Qronos). Scales and zero points are chosen by errors that count by their inputs, so the columns
can be taken in any order without a record of it. Then codes and scales are improved in turn: codes by a sweep of
coordinate descent, the scales of a row, all together, by least squares.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from converter.quantize.search import best_scales
from converter.quantize.sweep import sweep
from formats.codec import Quantized, as_stored, encode, grouped, pack, pack_zero_point
from formats.errors import CheckpointError
from formats.layout import Scheme

DAMPING = 0.01  # of the mean of the diagonal; ten times more as long as there is no factor
MOST_DAMPING = 10.0
SYSTEM_SIZES = 1 << 26  # numbers in the systems of equations that are solved at once
CORRECTION = 0.75  # of the mismatch: the rest of it is noise of the text
SWEEPS = 4  # of scales and codes in turn; from two to six the divergence of a model falls by a hundredth


@dataclass(frozen=True)
class Inputs:
    """What calibration saw of the inputs of a linear layer, means over `tokens`.

    `gram` X̃ᵀX̃ + damping · I fp32 [K, K] is of the inputs X̃ that the quantised model gives it; `drift` (X − X̃)ᵀX̃ fp32
    [K, K], or None, compares them with those of the original.
    """

    gram: Tensor
    damping: float
    drift: Tensor | None
    tokens: int

    def loss(self, difference: Tensor) -> Tensor:
        """‖D X̃ᵀ‖² of each row of D [N, K], a mean over tokens [N]."""
        return (loss(difference, self.gram) - self.damping * difference.square().sum(1)).clamp(min=0)


def gptq(weight: Tensor, inputs: Inputs, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Quantise `weight` [N, K] by GPTQ (Frantar et al. 2022), each row at least as well as `search` does.

    As well by the measure of the method: ‖(Ŵ − W′) X̃ᵀ‖² of the corrected weight W′.
    """
    gram, target = inputs.gram, weight.float()
    if inputs.drift is not None:
        target = target + CORRECTION * torch.linalg.solve(gram, target @ inputs.drift, left=False)
    scale, zero = best_scales(target, scheme, scale_dtype, gram.diagonal())
    found = descended(compensated(target, scale, zero, gram, scheme), target, gram, scheme)
    for _ in range(SWEEPS):
        refitted = replace(found, scale=fitted_scales(found, target, gram, scheme))
        found = better_rows(found, descended(refitted, target, gram, scheme), target, scheme, partial(loss, gram=gram))
    return better_rows(found, searched(weight.float(), scheme, scale_dtype), target, scheme, inputs.loss).packed(scheme)


def weighted_search(weight: Tensor, inputs: Inputs, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Quantise `weight` [N, K] by `search`, with errors that count by the mean square of their inputs."""
    return searched(weight.float(), scheme, scale_dtype, inputs.gram.diagonal()).packed(scheme)


@dataclass(frozen=True)
class Codes:
    """A quantised matrix before it is packed: codes int8 [N, K], scales as stored and zero points int8 [N, G]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, values: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> "Codes":
        """From values (code − zero) · scale fp32 [N, K]."""
        scales, zeros = (of_columns(x.float(), scheme, values.shape[1]) for x in (scale, zero))
        return cls(((values / scales).round() + zeros).to(torch.int8), scale, zero)

    def levels(self, scheme: Scheme) -> Tensor:
        """Codes less their zero points, fp32 [N, K]."""
        return self.codes - of_columns(self.zero.float(), scheme, self.codes.shape[1])

    def values(self, scheme: Scheme) -> Tensor:
        """Ŵ fp32 [N, K]."""
        return self.levels(scheme) * of_columns(self.scale.float(), scheme, self.codes.shape[1])

    def packed(self, scheme: Scheme) -> Quantized:
        """The format's tensors."""
        return Quantized(pack(self.codes), self.scale, None if scheme.symmetric else pack_zero_point(self.zero))


def searched(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None = None) -> Codes:
    """The nearest codes for the scales that `best_scales` finds for `weight` fp32 [N, K]."""
    scale, zero = best_scales(weight, scheme, scale_dtype, importance)
    return Codes(encode(weight, scale, zero, scheme), scale, zero)


def dampen(gram: Tensor, damping: float = DAMPING) -> float:
    """Add a share of the mean of its diagonal to the diagonal of `gram`, more until it has a factor; how much it was.

    Columns that no input reached are left with that alone: their codes are then those of plain rounding.
    """
    mean, added = gram.diagonal().mean().item(), 0.0
    while 0 < mean < math.inf and damping <= MOST_DAMPING:
        gram.diagonal().add_(damping * mean - added)
        added = damping * mean
        if not torch.linalg.cholesky_ex(gram).info:
            return added
        damping *= 10
    raise CheckpointError(f"inputs of calibration with a mean square of {mean:.3g} have no usable gram matrix")


def compensated(target: Tensor, scale: Tensor, zero: Tensor, gram: Tensor, scheme: Scheme) -> Codes:
    """Codes of `target` fp32 [N, K], in each column with the errors of those before it made up for.

    Columns come by falling diagonal of `gram` [K, K].
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    # In one expression, so that no matrix stays that is not needed: they are as large as a layer.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order])), upper=True)

    def pull(start: int, end: int) -> Tensor:
        rows: Tensor = factor[start:end, start:]
        return rows / rows.diagonal().unsqueeze(1)

    groups = order // scheme.group_width(len(order))
    values = sweep(target[:, order], None, pull, scale.float().T, zero.float().T, groups)
    return Codes.of(values[:, order.argsort()], scale, zero, scheme)


def descended(codes: Codes, target: Tensor, gram: Tensor, scheme: Scheme) -> Codes:
    """With the code in each column that is best as the others stand: a sweep of coordinate descent."""
    diagonal = gram.diagonal()

    def pull(start: int, end: int) -> Tensor:
        return gram[start:end, start:] / -diagonal[start:]

    before = codes.values(scheme)
    best = before - (before - target) @ gram / diagonal  # of each column, as the others stand
    groups = torch.arange(target.shape[1], device=target.device) // scheme.group_width(target.shape[1])
    values = sweep(best, before, pull, codes.scale.float().T, codes.zero.float().T, groups)
    return Codes.of(values, codes.scale, codes.zero, scheme)


def fitted_scales(codes: Codes, target: Tensor, gram: Tensor, scheme: Scheme) -> Tensor:
    """The scales [N, G], as stored, with which the codes come nearest to `target`: those of a row all together."""
    levels, wanted = codes.levels(scheme), target @ gram
    block = max(1, SYSTEM_SIZES // scheme.groups(target.shape[1]) ** 2)
    parts = zip(torch.split(levels, block), torch.split(wanted, block), strict=True)
    exact = torch.cat([_least_squares(part, products, gram, scheme) for part, products in parts])
    return torch.where(exact.isfinite() & (exact != 0), as_stored(exact, codes.scale.dtype), codes.scale)


def _least_squares(levels: Tensor, wanted: Tensor, gram: Tensor, scheme: Scheme) -> Tensor:
    """The exact scales [N, G] of `levels` [N, K], for `wanted` = target · gram."""
    columns, width = levels.shape[1], scheme.group_width(levels.shape[1])
    right = grouped(levels * wanted, scheme).sum(-1)
    left = torch.empty(*right.shape, right.shape[1], device=right.device)
    for i in range(right.shape[1]):
        part = slice(i * width, min((i + 1) * width, columns))
        left[:, i] = grouped((levels[:, part] @ gram[part]) * levels, scheme).sum(-1)
    tiny = left.diagonal(dim1=1, dim2=2).mean() * 1e-6  # for groups whose codes are all 0
    found: Tensor = torch.linalg.solve(left + tiny * torch.eye(right.shape[1], device=right.device), right)
    return found


def better_rows(one: Codes, other: Codes, target: Tensor, scheme: Scheme, measure: Callable[[Tensor], Tensor]) -> Codes:
    """The rows of `one`, or those of `other` that lose less by the `measure` of what they miss `target` by."""
    losses = [measure(codes.values(scheme) - target) for codes in (one, other)]
    worse = (losses[1] < losses[0]).unsqueeze(1)
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return Codes(*(torch.where(worse, theirs, ours) for ours, theirs in pairs))


def loss(difference: Tensor, gram: Tensor) -> Tensor:
    """Dᵢ · gram · Dᵢᵀ of each row of D [N, K]: [N]."""
    return ((difference @ gram) * difference).sum(1)


def of_columns(values: Tensor, scheme: Scheme, columns: int) -> Tensor:
    """[N, G] for each of the columns [N, K]."""
    return values.repeat_interleave(scheme.group_width(columns), dim=1)[:, :columns]
