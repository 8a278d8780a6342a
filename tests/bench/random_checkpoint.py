"""Write a Llama-shaped bf16 checkpoint of random weights, shard by shard, with a tokenizer to evaluate it by.

Run: PYTHONPATH=. python tests/bench/random_checkpoint.py OUT_DIR --size 1b
"""

import json
import shutil
from pathlib import Path

import click
import torch

from formats.container import Writer
from formats.files import publish
from formats.layout import TensorSpec
from formats.tensors import bytes_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"
SHARD_BYTES = 5_000_000_000  # as the Hub's models come
SIZES = {  # the public configurations of Llama-3.2-1B and Llama-3.1-8B
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "attention_bias": False,
    "mlp_bias": False, "initializer_range": 0.02, "bos_token_id": 128000, "eos_token_id": 128001, "dtype": "bfloat16",
}  # fmt: skip


def tensors_of(config: dict[str, int]) -> dict[str, TensorSpec]:
    """Names and shapes of a Llama's tensors."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens": (COMMON["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.input_layernorm": (hidden,),
            f"model.layers.{i}.self_attn.q_proj": (queries, hidden),
            f"model.layers.{i}.self_attn.k_proj": (keys, hidden),
            f"model.layers.{i}.self_attn.v_proj": (keys, hidden),
            f"model.layers.{i}.self_attn.o_proj": (hidden, queries),
            f"model.layers.{i}.post_attention_layernorm": (hidden,),
            f"model.layers.{i}.mlp.gate_proj": (inner, hidden),
            f"model.layers.{i}.mlp.up_proj": (inner, hidden),
            f"model.layers.{i}.mlp.down_proj": (hidden, inner),
        }
    shapes["model.norm"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (COMMON["vocab_size"], hidden)
    return {f"{name}.weight": TensorSpec("BF16", shape) for name, shape in shapes.items()}


def shards_of(tensors: dict[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    """The tensors in files of at most SHARD_BYTES."""
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in tensors.items():
        if sum(other.nbytes for other in shards[-1].values()) + spec.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    return shards


def random_tensor(spec: TensorSpec, device: str) -> torch.Tensor:
    """Ones for a norm, else N(0, 0.02²)."""
    if len(spec.shape) == 1:
        return torch.ones(spec.shape, dtype=torch.bfloat16)
    return (torch.randn(spec.shape, device=device) * 0.02).bfloat16()


@click.command(help=__doc__)
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--size", type=click.Choice(sorted(SIZES)), default="1b")
@click.option("--layers", type=click.IntRange(min=1), help="Decoder layers, where the model's own number is too many.")
def main(out_dir: Path, size: str, layers: int | None) -> None:
    """Write the checkpoint."""
    config = SIZES[size] if layers is None else {**SIZES[size], "num_hidden_layers": layers}
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out_dir.mkdir(parents=True)
    shards = shards_of(tensors_of(config))
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with publish(out_dir / file) as new, Writer(new, shard, {"format": "pt"}) as writer:
            for name, spec in shard.items():
                writer.put(name, bytes_of(random_tensor(spec, device)))
                weight_map[name] = file
            writer.finish()
    (out_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out_dir / "config.json").write_text(json.dumps({**COMMON, **config}, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, out_dir / name)


if __name__ == "__main__":
    main()
