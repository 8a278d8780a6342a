"""The definition of the numbers, in plain torch: what codes, scales and zero points are and how they are packed.

Every kernel of this project must agree with this module bit for bit. W ≈ (code − zero) · scale, group by group.
N = rows, K = columns, G = groups in a row (see SPEC.md). Where [N, K] stands, a stack [E, N, K] will do too: each
of its matrices is as it would be alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.errors import CheckpointError, NonFiniteError
from formats.layout import CODE_MAX, CODE_MIN, CODES_PER_WORD, Scheme, ceil_div

LEVELS = CODE_MAX - CODE_MIN

# The smallest magnitude a scale may have: what its type can hold and fp32 holds as a normal number.
MIN_SCALE = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@dataclass(frozen=True)
class Quantized:
    """A matrix in the format's own tensors, named as their suffixes on disk."""

    packed: Tensor  #: int32 [N, ceil(K/8)]
    scale: Tensor  #: bf16 or fp16 [N, G]
    zero_point: Tensor | None = None  #: int32 [ceil(N/8), G], only in the asymmetric scheme

    def tensors(self) -> list[Tensor]:
        """The tensors in the order of `Scheme.stored`."""
        return [t for t in (self.packed, self.scale, self.zero_point) if t is not None]

    @classmethod
    def stacked(cls, matrices: Sequence["Quantized"]) -> "Quantized":
        """A stack of matrices that are all alike."""
        parts = [torch.stack(tensors) for tensors in zip(*(one.tensors() for one in matrices), strict=True)]
        return cls(*parts)

    def matrix(self, number: int) -> "Quantized":
        """One matrix of a stack."""
        return Quantized(*(tensor[number] for tensor in self.tensors()))

    def rows(self, start: int, end: int, device: torch.device) -> "Quantized":
        """The rows from `start` to `end`, on `device`; `start` is a multiple of 8 where there are zero points.

        Those of a stack are numbered through all its matrices. They lie in one of them, or each has a multiple of 8.
        """
        if self.packed.dim() == 3:
            height = self.packed.shape[1]
            if height % CODES_PER_WORD:
                return self.matrix(start // height).rows(start % height, start % height + end - start, device)
            parts = [tensor.flatten(0, 1) for tensor in self.tensors()]
            return Quantized(*parts).rows(start, end, device)
        zero = self.zero_point
        return Quantized(
            self.packed[start:end].to(device),
            self.scale[start:end].to(device),
            None if zero is None else zero[start // CODES_PER_WORD : ceil_div(end, CODES_PER_WORD)].to(device),
        )


def pack(codes: Tensor) -> Tensor:
    """Codes −8..7 as int8 [N, K] → words int32 [N, ceil(K/8)]; word w holds columns 8w.. from its low bits up."""
    *rows, columns = codes.shape
    words = ceil_div(columns, CODES_PER_WORD)
    nibbles = padded(codes, words * CODES_PER_WORD).sub(CODE_MIN).to(torch.uint8)
    octets = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return octets.flatten().view(torch.int32).view(*rows, words)  # little-endian, as every machine that torch runs on


def unpack(words: Tensor, columns: int) -> Tensor:
    """Words int32 [N, ceil(K/8)] → codes int8 [N, K]: the inverse of `pack`."""
    *rows, count = words.shape
    octets = words.flatten().view(torch.uint8)
    nibbles = torch.stack((octets & 0xF, octets >> 4), dim=-1).view(*rows, count * CODES_PER_WORD)
    return (nibbles.to(torch.int8) + CODE_MIN)[..., :columns]


def pack_zero_point(zero: Tensor) -> Tensor:
    """Zero points −8..7 as int8 [N, G] → words int32 [ceil(N/8), G], packed along N."""
    return pack(zero.mT).mT.contiguous()


def unpack_zero_point(words: Tensor, rows: int) -> Tensor:
    """Words int32 [ceil(N/8), G] → zero points int8 [N, G]."""
    return unpack(words.mT, rows).mT


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[N, K] → [N, G, group width]; a short last group is filled up with zeros."""
    *rows, columns = weight.shape
    width, groups = scheme.group_width(columns), scheme.groups(columns)
    return padded(weight, groups * width).reshape(*rows, groups, width)


def padded(x: Tensor, columns: int) -> Tensor:
    """x [N, K], filled up with zeros to so many columns; F.pad would copy it even where none is missing."""
    return x if x.shape[-1] == columns else F.pad(x, (0, columns - x.shape[-1]))


def as_stored(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """fp32 scales of either sign as they are stored: rounded, never zero; 1 where they are 0 (groups of zeros)."""
    rounded = scale.to(scale_dtype)
    stored = torch.copysign(rounded.abs().clamp(min=MIN_SCALE[scale_dtype]), rounded)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def absmax(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The plain scales of `weight` fp32 [N, K]: max|w| / 7, or min–max over 15 steps with zero points.

    Returns scales [N, G] in `scale_dtype`, and zero points int8 [N, G] in the asymmetric scheme.
    """
    groups = grouped(weight, scheme)
    if scheme.symmetric:
        return as_stored(groups.abs().amax(-1) / CODE_MAX, scale_dtype), None
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = as_stored(high / LEVELS - low / LEVELS, scale_dtype)  # two divisions: high − low could overflow
    zero = torch.round(CODE_MIN - low / scale.float()).clamp(CODE_MIN, CODE_MAX)
    return scale, zero.to(torch.int8)


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes int8 [N, K] of `weight` fp32 [N, K] for `scale` as stored [N, G] and `zero` int8 [N, G].

    code = clamp(round half to even(w / scale) + zero, −8, 7), computed in fp32.
    """
    codes = torch.round(grouped(weight, scheme) / scale.float().unsqueeze(-1))
    if zero is not None:
        codes += zero.unsqueeze(-1)
    return codes.clamp_(CODE_MIN, CODE_MAX).to(torch.int8).flatten(-2)[..., : weight.shape[-1]]


def encoded(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Quantized:
    """`weight` fp32 [N, K] in the format's tensors, by `encode`."""
    packed = pack(encode(weight, scale, zero, scheme))
    return Quantized(packed, scale, None if zero is None else pack_zero_point(zero))


def quantize(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Quantized:
    """Quantise `weight` [N, K] of any floating type with `absmax` scales in `scale_dtype` (bf16 or fp16).

    Raises `NonFiniteError` on NaN or infinity.
    """
    check_finite(weight)
    weight = weight.float()
    return encoded(weight, *absmax(weight, scheme, scale_dtype), scheme)


def dequantize(quantized: Quantized, columns: int, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """(code − zero) · scale as `dtype` [N, K]; the product is formed in fp32 and rounded once."""
    codes = grouped(unpack(quantized.packed, columns).float(), scheme)
    if quantized.zero_point is not None:
        codes = codes - unpack_zero_point(quantized.zero_point, codes.shape[-3]).unsqueeze(-1)
    weight = codes * quantized.scale.float().unsqueeze(-1)
    return weight.flatten(-2)[..., :columns].to(dtype)


def check_finite(weight: Tensor, where: str = "weight") -> None:
    """Raise `NonFiniteError` with count and first place if `weight` [N, K] holds NaN or infinity."""
    if not weight.numel() or weight.abs().amax().isfinite():  # amax passes NaN on; half the time of looking at each
        return
    bad = ~torch.isfinite(weight)
    first = zip(("matrix", "row", "column")[-bad.dim() :], bad.nonzero()[0].tolist(), strict=True)
    place = ", ".join(f"{name} {i}" for name, i in first)
    raise NonFiniteError(
        f"{where}: {int(bad.sum())} of {weight.numel()} weights are NaN or infinite, first at {place}; "
        "expected finite numbers: repair the source, or keep this tensor with --exclude"
    )


def check_scale(scale: Tensor) -> None:
    """Raise `CheckpointError` if a stored scale is NaN, infinite or zero."""
    bad = ~torch.isfinite(scale) | (scale == 0)
    if bad.any():
        raise CheckpointError(f"{int(bad.sum())} of {scale.numel()} scales are NaN, infinite or zero; convert it again")
