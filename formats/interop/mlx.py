"""The affine layout of MLX checkpoints (mlx-lm): Ŵ = scale · q + bias with q from 0 to 15.

The words are those of this project byte for byte, and bias = −8 · scale, which is exact unless it overflows. A negative
scale is usual: `mx.quantize` writes them itself. A zero point takes a bias of −z · scale, which seldom fits the type of
the scales, so matrices with zero points go over only where it does. The formula is meant as written, in fp32: kernels
of MLX that compute in 16 bits round in between, as they do for its own models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.codec import Quantized, pack_zero_point, unpack_zero_point
from formats.errors import CheckpointError
from formats.interop.base import Layout, Parts, group_setting, nibbles, setting, widened
from formats.layout import BITS, CODE_MIN, CODES_PER_WORD, Scheme, TensorSpec

WORDS, SCALES, BIASES = "weight", "scales", "biases"
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Mlx(Layout):
    """Groups of 32, 64 or 128, scales of either sign; its files do not say whether there are zero points."""

    name = "mlx"
    words = WORDS
    metadata = {"format": "mlx"}  # noqa: RUF012 - never changed
    stacks = True

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Mlx":
        """See `Layout`; `settings` is the `quantization`. Matrices with others of their own do not fit these."""
        setting(settings, "bits", (BITS,))
        setting(settings, "mode", ("affine",), default="affine")
        return cls(Scheme(group_setting(settings)))

    def refusal(self, rows: int, columns: int) -> str | None:
        """See `Layout`."""
        size = self.scheme.group_size
        return None if size in GROUP_SIZES else f"groups of {size}, it has {GROUP_SIZES}: give a --group-size"

    def specs(self, rows: int, columns: int, scale_dtype: str) -> dict[str, TensorSpec]:
        """See `Layout`."""
        groups = TensorSpec(scale_dtype, (rows, self.scheme.groups(columns)))
        return {WORDS: TensorSpec("U32", (rows, columns // CODES_PER_WORD)), SCALES: groups, BIASES: groups}

    def shape(self, words: TensorSpec) -> tuple[int, int]:
        """See `Layout`."""
        return words.shape[0], words.shape[1] * CODES_PER_WORD

    def relayout(self, matrix: Quantized, columns: int) -> dict[str, Tensor]:
        """See `Layout`."""
        zero = torch.zeros_like(matrix.scale, dtype=torch.int8)
        if matrix.zero_point is not None:
            zero = unpack_zero_point(matrix.zero_point, len(matrix.scale))
        exact = (CODE_MIN - zero.float()) * matrix.scale.float()
        biases = exact.to(matrix.scale.dtype)
        if bad := int((biases.float() != exact).sum()):
            raise CheckpointError(f"{bad} of {exact.numel()} biases, −zero · scale, do not fit {matrix.scale.dtype}")
        return {WORDS: matrix.packed.view(torch.uint32), SCALES: matrix.scale, BIASES: biases}

    def restore(self, parts: Parts) -> Quantized:
        """See `Layout`."""
        scale, bias = parts[SCALES], parts[BIASES]
        steps = torch.where(scale == 0, -bias.float(), -bias.float() / scale.float()).round().clamp(0, 15)
        if bad := int((steps * scale.float() != -bias.float()).sum()):
            raise CheckpointError(f"{bad} of {bias.numel()} biases are no whole number of scales from 0 to −15")
        zero = pack_zero_point((steps + CODE_MIN).to(torch.int8))
        return Quantized(parts[WORDS].view(torch.int32), scale, zero)

    def decode(self, parts: Parts, rows: slice) -> Tensor:
        """See `Layout`."""
        codes = nibbles(parts[WORDS].view(torch.int32)[rows]).float()
        scale, bias = (widened(parts[name][rows].float(), codes.shape[1]) for name in (SCALES, BIASES))
        return scale * codes + bias

    def config(self, quantized: Sequence[str], kept: Mapping[str, str]) -> dict[str, Any]:
        """See `Layout`; mlx-lm sees by the tensors which modules are in int4."""
        found = {"group_size": self.scheme.group_size, "bits": BITS, "mode": "affine"}
        return {"quantization": found, "quantization_config": found}
