"""The GEMM layout of AWQ checkpoints (AutoAWQ, llm-awq): words along N, in an order of their own.

Ŵ = (q − z) · scale with q, z from 0 to 15. Every matrix has zero points, and no tool of AWQ writes a negative scale.
Nor does this one: (q − z) · s = ((15 − q) − (15 − z)) · −s, exactly and for every q and z.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.codec import Quantized, pack, unpack, unpack_zero_point
from formats.interop.base import (
    Layout,
    Parts,
    group_setting,
    is_head,
    multiple_of_eight,
    nibbles,
    setting,
    widened,
    words_of,
)
from formats.interop.signs import mirrored
from formats.layout import BITS, CODES_PER_WORD, Scheme, TensorSpec

QWEIGHT, QZEROS, SCALES = "qweight", "qzeros", "scales"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is of its row ORDER[i]
PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # row i is in its nibble PLACE[i]


@dataclass(frozen=True)
class Awq(Layout):
    """Any group size that divides the rows, N a multiple of 8, zero points always, positive scales."""

    name = "awq"
    words = QWEIGHT

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Awq":
        """See `Layout`; transformers and llm-awq name bits and group size otherwise."""
        setting(settings, "bits" if "bits" in settings else "w_bit", (BITS,))
        setting(settings, "version", ("gemm", "GEMM"), default="gemm")
        setting(settings, "zero_point", (True,), default=True)
        size = group_setting(settings, "group_size" if "group_size" in settings else "q_group_size")
        return cls(Scheme(size, symmetric=False))

    def refusal(self, rows: int, columns: int) -> str | None:
        """See `Layout`."""
        return multiple_of_eight(rows)

    def specs(self, rows: int, columns: int, scale_dtype: str) -> dict[str, TensorSpec]:
        """See `Layout`."""
        groups = self.scheme.groups(columns)
        return {
            QWEIGHT: TensorSpec("I32", (columns, rows // CODES_PER_WORD)),
            QZEROS: TensorSpec("I32", (groups, rows // CODES_PER_WORD)),
            SCALES: TensorSpec(scale_dtype, (groups, rows)),
        }

    def shape(self, words: TensorSpec) -> tuple[int, int]:
        """See `Layout`."""
        return words.shape[1] * CODES_PER_WORD, words.shape[0]

    def relayout(self, matrix: Quantized, columns: int) -> dict[str, Tensor]:
        """See `Layout`."""
        rows = len(matrix.scale)
        if matrix.zero_point is None:
            zero = torch.zeros_like(matrix.scale, dtype=torch.int8)
        else:
            zero = unpack_zero_point(matrix.zero_point, rows)
        width, turned = self.scheme.group_width(columns), matrix.scale < 0
        codes, zero, scale = mirrored(unpack(matrix.packed, columns), zero, matrix.scale, turned, width)
        return {QWEIGHT: _packed(codes), QZEROS: _packed(zero), SCALES: scale.T.contiguous()}

    def restore(self, parts: Parts) -> Quantized:
        """See `Layout`."""
        codes, zero = _unpacked(parts[QWEIGHT]), _unpacked(parts[QZEROS])
        return Quantized(pack(codes), parts[SCALES].T.contiguous(), pack(zero.T).T.contiguous())

    def decode(self, parts: Parts, rows: slice) -> Tensor:
        """See `Layout`."""
        columns = len(parts[QWEIGHT])
        codes, zero = (_rows(nibbles(parts[name][:, words_of(rows)])).T.float() for name in (QWEIGHT, QZEROS))
        return (codes - widened(zero, columns)) * widened(parts[SCALES].T[rows].float(), columns)

    def config(self, quantized: Sequence[str], kept: Mapping[str, str]) -> dict[str, Any]:
        """See `Layout`; engines look for these in names, transformers takes them for regular expressions too."""
        found = {
            "quant_method": self.name,
            "bits": BITS,
            "group_size": self.scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "lm_head": any(map(is_head, quantized)),
            "modules_to_not_convert": [*kept, *dict.fromkeys(kept.values())],
        }
        return {"quantization_config": found}


def _packed(codes: Tensor) -> Tensor:
    """Codes −8..7 as int8 [N, X] → words int32 [X, N/8]."""
    return pack(codes.T.reshape(codes.shape[1], -1, CODES_PER_WORD)[..., ORDER].flatten(1))


def _unpacked(words: Tensor) -> Tensor:
    """The inverse of `_packed`."""
    return _rows(unpack(words, words.shape[1] * CODES_PER_WORD)).T


def _rows(values: Tensor) -> Tensor:
    """Values [X, N] in the order of their nibbles → in the order of their rows."""
    return values.reshape(len(values), -1, CODES_PER_WORD)[..., PLACE].flatten(1)
