"""The `pack-quantized` form of compressed-tensors (llm-compressor, vLLM), version 0.9 and later.

Its words, scales and zero points are those of this project byte for byte, so nothing is repacked: a `weight_shape`
stands beside them. Ŵ = (code − zero) · scale with the scale in the model's type. A negative scale is a factor like any
other to the library (`compressed_tensors/quantization/lifecycle/forward_helpers.py`, `_dequantize`) and to the kernels
of vLLM and SGLang (Marlin, Machete, Triton), which multiply by it after the zero point is gone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.codec import Quantized
from formats.errors import CheckpointError
from formats.interop.base import (
    HEAD,
    OTHER_HEADS,
    Layout,
    Parts,
    group_setting,
    is_head,
    nibbles,
    setting,
    widened,
    words_of,
)
from formats.layout import BITS, CODE_MIN, CODES_PER_WORD, ROW_WISE, Scheme, TensorSpec, ceil_div

PACKED, SCALE, SHAPE, ZERO_POINT = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
FORMAT = "pack-quantized"
REGEX = "re:"  # before a regular expression


@dataclass(frozen=True)
class CompressedTensors(Layout):
    """Any group size that divides the rows, zero points or none, scales of either sign."""

    name = "compressed-tensors"
    words = PACKED
    expert_zero_points = False  # neither the MoE kernels of vLLM and SGLang nor transformers take them

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "CompressedTensors":
        """See `Layout`; `settings` is the `quantization_config`."""
        setting(settings, "format", (FORMAT,))
        for name in ("kv_cache_scheme", "transform_config", "sparsity_config"):
            setting(settings, name, (None, {}))
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
            raise CheckpointError(f"config_groups is {groups!r:.80}, expected one group or more")
        layouts = {cls._of_group(group) for group in groups.values()}
        if len(layouts) > 1:
            raise CheckpointError(f"its {len(groups)} config_groups differ, expected one scheme for all")
        return layouts.pop()

    @classmethod
    def _of_group(cls, group: Mapping[str, Any]) -> "CompressedTensors":
        for name in ("input_activations", "output_activations"):
            setting(group, name, (None,))
        setting(group, "format", (FORMAT, None))
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise CheckpointError(f"weights of a config group is {weights!r:.80}, expected their scheme")
        setting(weights, "num_bits", (BITS,))
        setting(weights, "type", ("int",))
        setting(weights, "actorder", (None, False, "weight", "static"))  # those leave the columns in their order
        symmetric = setting(weights, "symmetric", (True, False), default=True)
        by_rows = setting(weights, "strategy", ("group", "channel")) == "channel"
        return cls(Scheme(ROW_WISE if by_rows else group_setting(weights), symmetric))

    def refusal(self, rows: int, columns: int) -> str | None:
        """See `Layout`."""
        return None

    def specs(self, rows: int, columns: int, scale_dtype: str) -> dict[str, TensorSpec]:
        """See `Layout`."""
        groups = self.scheme.groups(columns)
        parts = {
            PACKED: TensorSpec("I32", (rows, ceil_div(columns, CODES_PER_WORD))),
            SCALE: TensorSpec(scale_dtype, (rows, groups)),
            SHAPE: TensorSpec("I64", (2,)),
        }
        if not self.scheme.symmetric:
            parts[ZERO_POINT] = TensorSpec("I32", (ceil_div(rows, CODES_PER_WORD), groups))
        return parts

    def shape(self, words: TensorSpec) -> tuple[int, int]:
        """See `Layout`."""
        return words.shape[0], words.shape[1] * CODES_PER_WORD

    def relayout(self, matrix: Quantized, columns: int) -> dict[str, Tensor]:
        """See `Layout`."""
        parts = {PACKED: matrix.packed, SCALE: matrix.scale, SHAPE: torch.tensor([len(matrix.packed), columns])}
        return parts if matrix.zero_point is None else {**parts, ZERO_POINT: matrix.zero_point}

    def restore(self, parts: Parts) -> Quantized:
        """See `Layout`."""
        packed = parts[PACKED]
        expected = [packed.shape[0], packed.shape[1] * CODES_PER_WORD]
        if (found := parts[SHAPE].tolist()) != expected:  # K is planned by the words alone, which headers tell
            raise CheckpointError(
                f"{SHAPE} is {found}, expected {expected}: rows that end within a word of {CODES_PER_WORD} codes are "
                "not read back; convert the model that it was made from"
            )
        return Quantized(packed, parts[SCALE], parts.get(ZERO_POINT))

    def decode(self, parts: Parts, rows: slice) -> Tensor:
        """See `Layout`."""
        columns = int(parts[SHAPE][1])
        codes = nibbles(parts[PACKED][rows])[:, :columns].float() + CODE_MIN
        if ZERO_POINT in parts:
            zero = nibbles(parts[ZERO_POINT][words_of(rows)].T).T[: len(codes)].float() + CODE_MIN
            codes = codes - widened(zero, columns)
        return codes * widened(parts[SCALE][rows].float(), columns)

    def config(self, quantized: Sequence[str], kept: Mapping[str, str]) -> dict[str, Any]:
        """See `Layout`; an output head that shares the embedding has no tensor, and is a linear layer nevertheless."""
        heads = [] if any(map(is_head, quantized)) else [HEAD]
        if heads and not any(map(is_head, kept)):
            heads.append(f"{REGEX}({'|'.join(map(re.escape, OTHER_HEADS))})$")
        others = dict.fromkeys(REGEX + regex for name, regex in kept.items() if name not in heads)
        by_rows = self.scheme.group_size == ROW_WISE
        weights = {
            "num_bits": BITS,
            "type": "int",
            "symmetric": self.scheme.symmetric,
            "strategy": "channel" if by_rows else "group",
            "group_size": None if by_rows else self.scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        group = {
            "targets": ["Linear"],
            "format": FORMAT,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        found = {
            "quant_method": self.name,
            "format": FORMAT,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": [*heads, *others],
            "config_groups": {"group_0": group},
        }
        return {"quantization_config": found}
