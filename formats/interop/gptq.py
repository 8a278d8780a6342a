"""The layout of GPTQ checkpoints (AutoGPTQ, GPTQModel), its versions 1 and 2, without act-order.

`qweight` is the transpose of this project's words, `scales` of its scales. Ŵ = (q − z) · scale with q, z from 0 to 15;
version 1 stores z − 1, which has no place for z = 0, so matrices with zero points are written in version 2. Scales of
either sign are taken: the kernels of vLLM (Marlin, ExLlama) and GPTQModel multiply q − z by them. They keep their type:
AutoGPTQ wrote fp16, today's engines take the type of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.codec import Quantized, pack
from formats.errors import CheckpointError
from formats.interop.base import Layout, Parts, group_setting, is_head, multiple_of_eight, nibbles, setting, words_of
from formats.layout import BITS, CODE_MIN, CODES_PER_WORD, Scheme, TensorSpec

QWEIGHT, QZEROS, SCALES, G_IDX = "qweight", "qzeros", "scales", "g_idx"
VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is taken off a zero point before it is stored


@dataclass(frozen=True)
class Gptq(Layout):
    """Any group size that divides the rows, N and K multiples of 8, zero points or none, scales of either sign."""

    version: str = "gptq"

    name = "gptq"
    words = QWEIGHT
    optional = frozenset({G_IDX})
    conv1d = True  # GPTQModel and optimum put their layer in its place

    @classmethod
    def for_export(cls, scheme: Scheme) -> "Gptq":
        """See `Layout`."""
        return cls(scheme, "gptq" if scheme.symmetric else "gptq_v2")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Gptq":
        """See `Layout`; act-order is seen in each `g_idx`."""
        setting(settings, "bits", (BITS,))
        setting(settings, "is_marlin_format", (False, None))
        setting(settings, "pack_dtype", ("int32", None))
        version = setting(settings, "checkpoint_format", tuple(VERSIONS), default="gptq")
        return cls(Scheme(group_setting(settings), setting(settings, "sym", (True, False), default=True)), version)

    def refusal(self, rows: int, columns: int) -> str | None:
        """See `Layout`."""
        return multiple_of_eight(rows) or (
            f"{columns} columns are no multiple of {CODES_PER_WORD}" if columns % CODES_PER_WORD else None
        )

    def specs(self, rows: int, columns: int, scale_dtype: str) -> dict[str, TensorSpec]:
        """See `Layout`."""
        groups = self.scheme.groups(columns)
        return {
            QWEIGHT: TensorSpec("I32", (columns // CODES_PER_WORD, rows)),
            QZEROS: TensorSpec("I32", (groups, rows // CODES_PER_WORD)),
            SCALES: TensorSpec(scale_dtype, (groups, rows)),
            G_IDX: TensorSpec("I32", (columns,)),
        }

    def shape(self, words: TensorSpec) -> tuple[int, int]:
        """See `Layout`."""
        return words.shape[1], words.shape[0] * CODES_PER_WORD

    def relayout(self, matrix: Quantized, columns: int) -> dict[str, Tensor]:
        """See `Layout`."""
        if matrix.zero_point is None:
            zero = pack(torch.full_like(matrix.scale.T, -VERSIONS[self.version], dtype=torch.int8))
        else:
            zero = matrix.zero_point.T.contiguous()
        return {
            QWEIGHT: matrix.packed.T.contiguous(),
            QZEROS: zero,
            SCALES: matrix.scale.T.contiguous(),
            G_IDX: self._in_order(columns),
        }

    def restore(self, parts: Parts) -> Quantized:
        """See `Layout`."""
        columns = parts[QWEIGHT].shape[0] * CODES_PER_WORD
        if not torch.equal(parts.get(G_IDX, self._in_order(columns)), self._in_order(columns)):
            raise CheckpointError(f"{G_IDX} takes the columns out of their order (act-order)")
        zero = nibbles(parts[QZEROS]) + VERSIONS[self.version]
        if (zero > 0xF).any():
            raise CheckpointError(f"a zero point is {int(zero.max())}, expected 0 to 15")
        codes = zero.to(torch.int8) + CODE_MIN
        words, scale = parts[QWEIGHT].T.contiguous(), parts[SCALES].T.contiguous()
        return Quantized(words, scale, pack(codes).T.contiguous())

    def decode(self, parts: Parts, rows: slice) -> Tensor:
        """See `Layout`."""
        groups = parts[G_IDX].long() if G_IDX in parts else self._in_order(parts[QWEIGHT].shape[0] * CODES_PER_WORD)
        zero = nibbles(parts[QZEROS][:, words_of(rows)]).float() + VERSIONS[self.version]
        codes = nibbles(parts[QWEIGHT][:, rows].T).T.float()  # [K, R]
        return ((codes - zero[groups]) * parts[SCALES][:, rows].float()[groups]).T

    def config(self, quantized: Sequence[str], kept: Mapping[str, str]) -> dict[str, Any]:
        """See `Layout`."""
        found = {
            "quant_method": self.name,
            "bits": BITS,
            "group_size": self.scheme.group_size,
            "sym": self.scheme.symmetric,
            "desc_act": False,
            "lm_head": any(map(is_head, quantized)),
            "checkpoint_format": self.version,
            "pack_dtype": "int32",
            "dynamic": {f"-:{regex}": {} for regex in kept.values()},
        }
        return {"quantization_config": found}

    def _in_order(self, columns: int) -> Tensor:
        """The group of each column, int32 [K]."""
        return torch.arange(columns, dtype=torch.int32) // self.scheme.group_width(columns)
