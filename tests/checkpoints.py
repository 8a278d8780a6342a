"""Small source checkpoints, written by the safetensors library so that our own writer is not its own judge."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.convert import convert, make_recipe
from converter.plan import make_plan
from converter.source import open_source
from formats.layout import Scheme
from formats.manifest import Manifest

SHARED = Path(__file__).parents[2] / "shared"
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def tiny_tensors() -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": random(32, 24, seed=1),
        "model.layers.0.q_proj.weight": random(16, 24, seed=2),
        "model.layers.0.q_proj.bias": random(16, seed=3),
        "model.layers.0.down_proj.weight": random(9, 20, seed=4),
        "model.norm.weight": random(24, seed=5),
        "lm_head.weight": random(32, 24, seed=6),
    }


CONFIG = {"model_type": "test", "hidden_size": 24}


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
    shards: int = 2,
    config: dict[str, Any] = CONFIG,
) -> Path:
    """A checkpoint folder of `shards` files with index, configuration and a few side files."""
    tensors = tiny_tensors() if tensors is None else tensors
    folder.mkdir(parents=True)
    names = list(tensors)
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    parts = {file: {name: tensors[name] for name in names[i::shards]} for i, file in enumerate(files)}
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        write_index(folder, {name: file for file, part in parts.items() for name in part})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("free\n")
    return folder


def add_to_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def convert_folder(
    source: Path,
    out: Path,
    scheme: Scheme = Scheme(8),  # noqa: B008  a frozen value
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    overwrite: bool = False,
    device: str = "cpu",
    method: str = "absmax",
) -> Manifest:
    opened = open_source(str(source))
    plan = make_plan(opened, make_recipe(scheme, method, include, exclude))
    return convert(opened, plan, out, [torch.device(device)], overwrite=overwrite)


def stored(out: Path) -> dict[str, Tensor]:
    """Every tensor of an int4 checkpoint, by the safetensors library."""
    return {name: tensor for path in out.glob("*.i4.safetensors") for name, tensor in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
