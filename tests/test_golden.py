"""Checkpoints of format version 1 as they were written once: what reads and writes them must not change."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import contents, stored, write_checkpoint
from torch import Tensor

from converter.convert import convert
from converter.plan import make_plan
from converter.source import open_source
from formats.checkpoint import Checkpoint
from formats.layout import Scheme
from formats.manifest import FORMAT_VERSION, Recipe

DATA = Path(__file__).parent / "data"
KINDS = {"symmetric": Scheme(16), "asymmetric": Scheme(16, symmetric=False), "rows": Scheme(-1)}


def weights() -> dict[str, Tensor]:
    """Tensors whose values are exact in every type, without any generator of random numbers."""
    wave = (torch.arange(12 * 40) * 37 % 101 - 50).view(12, 40) / 64
    return {
        "model.embed_tokens.weight": wave[:4].bfloat16(),
        "model.layers.0.up_proj.weight": wave.bfloat16(),
        "model.layers.0.down_proj.weight": wave.T[:13, :11].half().contiguous(),
        "model.norm.weight": wave[0].float(),
    }


def recipe_of(kind: str) -> Recipe:
    """A recipe with a converter that never changes its version."""
    scheme = KINDS[kind]
    return Recipe("int4-convert golden", "absmax", scheme.group_size, scheme.symmetric, (), ())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_source_gives_the_bytes_of_then(kind: str, tmp_path: Path) -> None:
    source = open_source(str(write_checkpoint(tmp_path / "source", weights())))
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
    for name, weight in weights().items():
        if "_proj" not in name:
            assert torch.equal(tensors[name], weight)
            continue
        packed, scale = tensors[f"{name}_packed"].tolist(), tensors[f"{name}_scale"].double()
        zeros = tensors.get(f"{name}_zero_point")
        width = weight.shape[1] if size == -1 else min(size, weight.shape[1])
        for n in range(weight.shape[0]):
            for k in range(weight.shape[1]):
                code = (packed[n][k // 8] >> 4 * (k % 8) & 15) - 8
                group = k // width
                zero = 0 if zeros is None else (int(zeros[n // 8, group]) >> 4 * (n % 8) & 15) - 8
                value = (code - zero) * scale[n, group].item()
                assert abs(value - weight[n, k].item()) <= 0.51 * abs(scale[n, group].item())
