"""Sources in FP8 with a scale for every block of a matrix, as DeepSeek and Qwen publish: read as the bf16 they mean."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.errors import CheckpointError
from formats.layout import TensorSpec, ceil_div

SCALE_SUFFIX = "_scale_inv"
FP8 = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16")
MEANT = "BF16"


@dataclass(frozen=True)
class BlockScaled:
    """How an FP8 matrix [N, K] is stored: its scales are `scale` [ceil(N / rows), ceil(K / columns)] in `shard`."""

    spec: TensorSpec
    scale: str
    shard: str
    rows: int
    columns: int

    @property
    def meant(self) -> TensorSpec:
        """The tensor that it stands for."""
        return TensorSpec(MEANT, self.spec.shape)

    def decode(self, part: Tensor, first: int, scales: Tensor) -> Tensor:
        """The rows `part` FP8 [R, K], from `first` on, times their `scales`, as bf16 [R, K]."""
        blocks = torch.arange(first, first + len(part), device=part.device) // self.rows
        wide = scales.to(part.device).float()[blocks].repeat_interleave(self.columns, dim=1)[:, : part.shape[1]]
        return (part.float() * wide).bfloat16()


def block_size(config: dict[str, Any] | None) -> tuple[int, int] | None:
    """Rows and columns of a block, where `config` says that the model is in block-scaled FP8."""
    found = (config or {}).get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "fp8":
        return None
    size = found.get("weight_block_size")
    is_size = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    return (size[0], size[1]) if is_size else None  # type: ignore[index]  # a list of two


def block_scaled(
    shards: dict[str, dict[str, TensorSpec]], block: tuple[int, int], where: str
) -> dict[str, BlockScaled]:
    """The FP8 matrices of `shards` by their names; raises `CheckpointError` for one whose scales do not fit it."""
    place = {name: shard for shard, tensors in shards.items() for name in tensors}
    found = {}
    for tensors in shards.values():
        for name, spec in tensors.items():
            if spec.dtype != FP8:
                continue
            scale = name + SCALE_SUFFIX
            scales = shards[place[scale]][scale] if scale in place else None
            expected = tuple(ceil_div(size, step) for size, step in zip(spec.shape, block, strict=False))
            if scales is None or scales.shape != expected or scales.dtype not in SCALE_DTYPES or len(spec.shape) != 2:
                raise CheckpointError(
                    f"{where}: tensor {name!r} ({spec}) has the scales {scales or 'missing'}, expected "
                    f"{' or '.join(SCALE_DTYPES)} {list(expected)} named {scale!r}; fetch the checkpoint again"
                )
            found[name] = BlockScaled(spec, scale, place[scale], *block)
    return found
