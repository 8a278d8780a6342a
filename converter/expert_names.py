"""What other programs call the experts of a model: data, looked up in their code.

Models of transformers hold experts fused; most checkpoints have them one by one, and so has what engines read in int4.
In transformers 5.23 `conversion_mapping.py` fuses them again (of Llama-4 `quantizers/base.py` splits the model); vLLM's
`model_executor/models` take experts one by one of Qwen3-VL-MoE and Gemma-4 too, if they are quantised. mlx-lm 0.32 has
them stacked, under the names that `sanitize` of its models makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """The names of experts that a model has as `experts.gate_up_proj` and `experts.down_proj`."""

    stacked: str | None = None  # mlx-lm's module in place of `experts`, if it has one
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    block: tuple[str, str] | None = None  # what stands around them: in models, in checkpoints

    def renamed(self, name: str) -> str:
        """What checkpoints call the tensor `name` of a model."""
        return name.replace(*self.block) if self.block else name


ARCHITECTURES = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_5_moe"),
        Experts("switch_mlp"),
    ),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "llama4_text", "qwen3_5_moe_text", "qwen3_next", "qwen3_vl_moe"), Experts()
    ),
    "llama4": Experts("experts"),
    "mixtral": Experts("switch_mlp", ("w1", "w3", "w2"), (".mlp.", ".block_sparse_moe.")),
}

# Of these mlx-lm stacks experts that stand one by one in int4; of others the words alone, and then it stops.
JOINED = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe"})


def experts_of(model_types: Sequence[str]) -> Experts | None:
    """The names of experts in a model of these types, that of the whole model first; None where they are not known."""
    return next((ARCHITECTURES[name] for name in model_types if name in ARCHITECTURES), None)
