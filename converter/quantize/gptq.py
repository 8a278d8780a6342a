"""GPTQ: codes that make up for each other, column by column, in what they do to the inputs of calibration.

The weight is first moved to what serves the inputs best that it will get from quantised layers before it (the mismatch
correction of GPTAQ and Qronos). Scales and zero points are chosen by errors that count by their inputs, so the columns
can be taken in any order without a record of it. Then codes and scales are improved in turn: codes by a sweep of
coordinate descent, the scales of a row, all together, by least squares.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converter.quantize.search import best_scales
from formats.codec import Quantized, as_stored, encode, grouped, pack, pack_zero_point
from formats.errors import CheckpointError
from formats.layout import CODE_MAX, CODE_MIN, Scheme

DAMPING = 0.01  # of the mean of the diagonal; ten times more as long as there is no factor
MOST_DAMPING = 10.0
SYSTEM_SIZES = 1 << 26  # numbers in the systems of equations that are solved at once
BLOCK_COLUMNS = 128  # whose errors reach the columns behind them as one product
CORRECTION = 0.75  # of the mismatch: the rest of it is noise of the text
SWEEPS = 4  # of scales and codes in turn; from two to six the divergence of a model falls by a hundredth


@dataclass(frozen=True)
class Inputs:
    """What calibration saw of the inputs of a linear layer, means over `tokens`.

    `gram` X̃ᵀX̃ fp32 [K, K] is of the inputs X̃ that the quantised model gives it; `drift` (X − X̃)ᵀX̃ fp32 [K, K], or None,
    compares them with those of the original.
    """

    gram: Tensor
    drift: Tensor | None
    tokens: int


def gptq(weight: Tensor, inputs: Inputs, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Quantise `weight` [N, K] by GPTQ (Frantar et al. 2022), each row at least as well as `search` does.

    As well by the measure of the method: ‖(Ŵ − W′) X̃ᵀ‖² of the corrected weight W′. Raises `CheckpointError` where the
    gram matrix of the inputs has no factor.
    """
    gram, target = damped(inputs.gram), weight.float()
    if inputs.drift is not None:
        target = target + CORRECTION * torch.linalg.solve(gram, target @ inputs.drift, left=False)
    scale, zero = best_scales(target, scheme, scale_dtype, gram.diagonal())
    found = descended(compensated(target, scale, zero, gram, scheme), target, gram, scheme)
    for _ in range(SWEEPS):
        refitted = replace(found, scale=fitted_scales(found, target, gram, scheme))
        found = better_rows(found, descended(refitted, target, gram, scheme), target, gram, scheme)
    return better_rows(found, searched(weight.float(), scheme, scale_dtype), target, inputs.gram, scheme).packed(scheme)


def weighted_search(weight: Tensor, inputs: Inputs, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Quantise `weight` [N, K] by `search`, with errors that count by the mean square of their inputs."""
    return searched(weight.float(), scheme, scale_dtype, damped(inputs.gram).diagonal()).packed(scheme)


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


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """`gram` with a share of the mean of its diagonal on the diagonal; more until it has a factor.

    Columns that no input reached are left with that alone: their codes are then those of plain rounding.
    """
    mean = gram.diagonal().mean()
    while damping <= MOST_DAMPING:
        tried = gram.clone()
        tried.diagonal().add_(damping * mean)
        if mean > 0 and mean.isfinite() and not torch.linalg.cholesky_ex(tried).info:
            return tried
        damping *= 10
    raise CheckpointError(f"inputs of calibration with a mean square of {mean.item():.3g} have no usable gram matrix")


def compensated(target: Tensor, scale: Tensor, zero: Tensor, gram: Tensor, scheme: Scheme) -> Codes:
    """Codes of `target` fp32 [N, K], in each column with the errors of those before it made up for.

    Columns come by falling diagonal of `gram` [K, K].
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    groups = (order // scheme.group_width(len(order))).tolist()
    # In one expression, so that no matrix stays that is not needed: they are as large as a layer.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order])), upper=True)
    w, scales, zeros = target[:, order], scale.float(), zero.float()
    for start in range(0, w.shape[1], BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, w.shape[1])
        errors = torch.empty_like(w[:, start:end])
        for i in range(start, end):
            value = nearest(w[:, i], scales[:, groups[i]], zeros[:, groups[i]])
            error = (w[:, i] - value) / factor[i, i]
            w[:, i] = value
            w[:, i + 1 : end] -= error.unsqueeze(1) * factor[i, i + 1 : end]
            errors[:, i - start] = error
        w[:, end:] -= errors @ factor[start:end, end:]
    return Codes.of(w[:, order.argsort()], scale, zero, scheme)


def descended(codes: Codes, target: Tensor, gram: Tensor, scheme: Scheme) -> Codes:
    """With the code in each column that is best as the others stand: a sweep of coordinate descent."""
    scales, zeros, width = codes.scale.float(), codes.zero.float(), scheme.group_width(target.shape[1])
    values = codes.values(scheme)
    slope = (values - target) @ gram
    for start in range(0, values.shape[1], BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, values.shape[1])
        before = values[:, start:end].clone()
        for i in range(start, end):
            best = nearest(values[:, i] - slope[:, i] / gram[i, i], scales[:, i // width], zeros[:, i // width])
            slope[:, i + 1 : end] += (best - values[:, i]).unsqueeze(1) * gram[i, i + 1 : end]
            values[:, i] = best
        slope[:, end:] += (values[:, start:end] - before) @ gram[start:end, end:]
    return Codes.of(values, codes.scale, codes.zero, scheme)


def nearest(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The value (code − zero) · scale nearest to each of w."""
    return ((w / scale).round().add_(zero).clamp_(CODE_MIN, CODE_MAX) - zero) * scale


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


def better_rows(one: Codes, other: Codes, target: Tensor, gram: Tensor, scheme: Scheme) -> Codes:
    """The rows of `one`, or those of `other` that lose less."""
    losses = [loss(codes.values(scheme) - target, gram) for codes in (one, other)]
    worse = (losses[1] < losses[0]).unsqueeze(1)
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return Codes(*(torch.where(worse, theirs, ours) for ours, theirs in pairs))


def loss(difference: Tensor, gram: Tensor) -> Tensor:
    """‖D X̃ᵀ‖² of each row of D [N, K], a mean over tokens [N]."""
    return ((difference @ gram) * difference).sum(1)


def of_columns(values: Tensor, scheme: Scheme, columns: int) -> Tensor:
    """[N, G] for each of the columns [N, K]."""
    return values.repeat_interleave(scheme.group_width(columns), dim=1)[:, :columns]
