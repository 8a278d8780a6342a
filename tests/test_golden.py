"""Checkpoints of format version 1 as they were written once: what reads and writes them must not change."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, contents, stored, write_checkpoint
from torch import Tensor

from converter.convert import convert
from converter.plan import make_plan
from converter.source import open_source
from formats.checkpoint import Checkpoint
from formats.layout import Scheme
from formats.manifest import FORMAT_VERSION, Recipe

DATA = Path(__file__).parent / "data"
KINDS = {
    "symmetric": Scheme(16),
    "asymmetric": Scheme(16, symmetric=False),
    "rows": Scheme(-1),
    "stacks": Scheme(16),
    "transposed": Scheme(16, symmetric=False),
}
EXPERTS = "model.layers.0.experts."


def weights(kind: str) -> dict[str, Tensor]:
    """Tensors whose values are exact in every type, without any generator of random numbers."""
    wave = (torch.arange(12 * 40) * 37 % 101 - 50).view(12, 40) / 64
    if kind == "stacks":
        return {
            EXPERTS + "gate_up_proj": wave.view(2, 12, 20).bfloat16(),
            EXPERTS + "down_proj": wave.flatten()[:240].view(2, 20, 6).half(),
            EXPERTS + "gate_up_proj_bias": wave[:2, :12].contiguous(),
        }
    if kind == "transposed":
        return {
            EXPERTS + "gate_up_proj": wave.view(2, 20, 12).bfloat16(),
            EXPERTS + "down_proj": wave.flatten()[:240].view(2, 6, 20).half(),
            "h.0.c_proj.weight": wave.clone(),
        }
    return {
        "model.embed_tokens.weight": wave[:4].bfloat16(),
        "model.layers.0.up_proj.weight": wave.bfloat16(),
        "model.layers.0.down_proj.weight": wave.T[:13, :11].half().contiguous(),
        "model.norm.weight": wave[0].float(),
    }


def write_source(folder: Path, kind: str) -> Path:
    """The source of a golden checkpoint."""
    config = {"model_type": "gpt2"} if kind == "transposed" else CONFIG
    return write_checkpoint(folder, weights(kind), config=config)


def recipe_of(kind: str) -> Recipe:
    """A recipe with a converter that never changes its version."""
    scheme = KINDS[kind]
    return Recipe("int4-convert golden", "absmax", scheme.group_size, scheme.symmetric, (), ())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_source_gives_the_bytes_of_then(kind: str, tmp_path: Path) -> None:
    source = open_source(str(write_source(tmp_path / "source", kind)))
    convert(source, make_plan(source, recipe_of(kind)), tmp_path / kind, [torch.device("cpu")])
    assert contents(tmp_path / kind) == contents(DATA / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_then_are_still_read(kind: str) -> None:
    checkpoint = Checkpoint(DATA / kind)
    checkpoint.verify()
    assert checkpoint.manifest.format_version == FORMAT_VERSION == 1
    found = {name: tensor for name, _, tensor in checkpoint.stream()}
    expected = stored(DATA / kind)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_by_the_specification_alone_finds_the_weights(kind: str) -> None:
    """SPEC.md in plain Python, number by number, without anything of ours."""
    tensors = stored(DATA / kind)
    size = json.loads((DATA / kind / "config.json").read_text())["quantization_config"]["group_size"]
    rows = {row["name"]: row for row in json.loads((DATA / kind / "manifest.json").read_text())["tensors"]}
    for name, weight in weights(kind).items():
        assert rows[name].get("transposed", False) == (kind == "transposed")
        if not name.endswith(("_proj", "_proj.weight")):
            assert torch.equal(tensors[name], weight)
            continue
        turned = weight.mT if rows[name].get("transposed") else weight
        packed, scales = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
        zero_points = tensors.get(f"{name}_zero_point")
        stacks = [tensor if tensor.dim() == 3 else tensor.unsqueeze(0) for tensor in (turned, packed, scales)]
        for e, (matrix, words, scale) in enumerate(zip(*stacks, strict=True)):
            zeros = zero_points[e] if zero_points is not None and zero_points.dim() == 3 else zero_points
            width = matrix.shape[1] if size == -1 else min(size, matrix.shape[1])
            for n in range(matrix.shape[0]):
                for k in range(matrix.shape[1]):
                    code = (int(words[n, k // 8]) >> 4 * (k % 8) & 15) - 8
                    group = k // width
                    zero = 0 if zeros is None else (int(zeros[n // 8, group]) >> 4 * (n % 8) & 15) - 8
                    step = scale[n, group].item()
                    # half a step, and at 15 steps the rounding of a bf16 scale
                    assert abs((code - zero) * step - matrix[n, k].item()) <= 0.53 * abs(step)
