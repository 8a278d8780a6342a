"""How far an int4 matrix is from its source, summed block by block."""

import torch
from torch import Tensor

from formats.codec import Quantized, dequantize, grouped, unpack_zero_point
from formats.layout import CODE_MAX, CODE_MIN, Scheme
from formats.manifest import ErrorRecord

DIGITS = 6  # the last bits of a sum depend on the device that adds
NOISE = 2.0**-32  # of a smaller relative error, a difference of sums in fp64, not all of these digits would be real


def sums(weight: Tensor, quantized: Quantized, scheme: Scheme) -> Tensor:
    """Of a block of rows ‖W‖², ‖Ŵ‖², W · Ŵ and the number of weights beyond codes −8 and 7; float64 [4].

    Products of fp32 are exact in fp64, so ‖W − Ŵ‖² can be had from these without a pass of its own.
    """
    weight = weight.float()
    found = dequantize(quantized, weight.shape[1], scheme)
    beyond = _beyond(weight, quantized, scheme).sum()
    w, v = (x.double().flatten() for x in (weight, found))
    return torch.stack([torch.dot(w, w), torch.dot(v, v), torch.dot(w, v), beyond]).cpu()


def _beyond(weight: Tensor, quantized: Quantized, scheme: Scheme) -> Tensor:
    """Which weights [N, G, group width] are more than half a step beyond the outermost codes."""
    groups, scale = grouped(weight, scheme), quantized.scale.float().unsqueeze(-1)
    zero: Tensor | int = 0
    if quantized.zero_point is not None:
        zero = unpack_zero_point(quantized.zero_point, weight.shape[0]).unsqueeze(-1)
    one, other = (CODE_MIN - 0.5 - zero) * scale, (CODE_MAX + 0.5 - zero) * scale  # a scale may be negative
    return (groups < torch.minimum(one, other)).logical_or_(groups > torch.maximum(one, other))


def error_record(total: Tensor, weights: int, output: float | None = None) -> ErrorRecord:
    """The figures of a matrix of so many weights from the `sums` of all its blocks, with the error of its outputs."""
    before, after, product, beyond = total.tolist()
    error, norms = max(0.0, before + after - 2 * product), (before * after) ** 0.5
    relative, cosine = error / before if error > before * NOISE else 0.0, product / norms if norms else 1.0
    exact = None if output is None else _rounded(output)
    return ErrorRecord(_rounded(relative), _rounded(cosine), _rounded(beyond / weights), exact)


def _rounded(figure: float) -> float:
    return float(f"{figure:.{DIGITS}g}")
