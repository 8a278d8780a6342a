"""Stacks of matrices, and matrices stored [in, out]: each as it would be alone, and the right way round."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, convert_folder, random, stored, write_checkpoint
from click.testing import CliRunner
from test_fp8 import COLUMNS, ROWS, in_fp8
from torch import Tensor

from converter import chunks
from converter.conversion import Conversion
from converter.convert import convert, make_recipe
from converter.pipeline import memory_needed
from converter.plan import make_plan
from converter.quantize import METHODS
from converter.source import open_source
from formats import cli, codec
from formats.checkpoint import Checkpoint
from formats.errors import NonFiniteError
from formats.layout import PACKED, SCALE, ZERO_POINT, Scheme
from formats.manifest import Manifest

SCHEMES = [Scheme(8), Scheme(16, symmetric=False), Scheme(-1)]
GATE_UP, DOWN = "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"


def experts(inner: int, hidden: int = 24, count: int = 3, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Fused experts the plain way round."""
    return {
        GATE_UP: random(count, 2 * inner, hidden, seed=1, dtype=dtype),
        DOWN: random(count, hidden, inner, seed=2, dtype=dtype),
    }


def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.mT.contiguous() for name, tensor in tensors.items()}


def one_by_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix of the stacks as the weight of a linear layer."""
    return {f"{name}.{e}.weight": matrix.clone() for name, stack in tensors.items() for e, matrix in enumerate(stack)}


def converted(
    folder: Path, tensors: dict[str, Tensor], scheme: Scheme, method: str = "absmax", **options: Any
) -> tuple[dict[str, Tensor], Manifest]:
    source = open_source(str(write_checkpoint(folder / "source", tensors, shards=1, **options)))
    plan = make_plan(source, make_recipe(scheme, method, (), ()))
    manifest = convert(source, plan, folder / "out", [torch.device("cpu")])
    return stored(folder / "out"), manifest


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("inner", [16, 13])  # 26 rows: words of zero points of two experts must not mix
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_turned", [False, True])
def test_each_matrix_of_a_stack_has_the_bytes_that_it_would_have_alone(
    tmp_path: Path, is_turned: bool, method: str, scheme: Scheme, inner: int, chunk_bytes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tensors = experts(inner)
    expected, _ = converted(tmp_path / "alone", one_by_one(tensors), scheme, method)
    if chunk_bytes:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    found, manifest = converted(tmp_path / "stack", turned(tensors) if is_turned else tensors, scheme, method)
    suffixes = [PACKED, SCALE] + [ZERO_POINT] * (not scheme.symmetric)
    assert found.keys() == {name + suffix for name in tensors for suffix in suffixes}
    for name, stack in tensors.items():
        for suffix in suffixes:
            matrices = [expected[f"{name}.{e}.weight{suffix}"] for e in range(len(stack))]
            assert torch.equal(found[name + suffix], torch.stack(matrices))
    assert manifest.requires == (("stacks", "transposed") if is_turned else ("stacks",))
    shapes = {name: tuple(stack.mT.shape if is_turned else stack.shape) for name, stack in tensors.items()}
    assert {row.name: row.shape for row in manifest.tensors} == shapes


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_conv1d_is_stored_as_the_linear_layer_that_it_is(
    tmp_path: Path, scheme: Scheme, chunk_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    weight = random(29, 24)
    expected, plain = converted(tmp_path / "linear", {name: weight}, scheme)
    if chunk_bytes:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    found, manifest = converted(tmp_path / "conv", turned({name: weight}), scheme, config={"model_type": "gpt2"})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    row, as_linear = manifest.tensors[0], plain.tensors[0]
    assert (row.shape, row.reason, row.error) == ((24, 29), "Conv1D, stored [in, out]", as_linear.error)
    assert (manifest.requires, plain.requires) == (("transposed",), ())


def test_a_conv1d_in_fp8_is_turned_as_what_it_means(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    fp8, scales, meant = in_fp8(random(40, 56))
    config = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [ROWS, COLUMNS]},
        "model_type": "gpt2",
    }
    found, _ = converted(tmp_path / "fp8", {name: fp8, f"{name}_scale_inv": scales}, Scheme(8), config=config)
    expected, _ = converted(tmp_path / "bf16", {name: meant.T.contiguous()}, Scheme(8))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("is_turned", [False, True])
def test_the_error_of_a_stack_is_that_of_all_its_matrices(tmp_path: Path, is_turned: bool) -> None:
    tensors = experts(16)
    _, manifest = converted(tmp_path / "stack", turned(tensors) if is_turned else tensors, Scheme(8))
    rows = {f"{name}.weight": stack.flatten(0, 1) for name, stack in tensors.items()}
    _, expected = converted(tmp_path / "rows", rows, Scheme(8))
    assert len(manifest.tensors) == len(tensors)
    for found, one in zip(manifest.tensors, expected.tensors, strict=True):
        assert found.error is not None
        assert one.error is not None
        assert found.error.relative_mse == pytest.approx(one.error.relative_mse, rel=1e-5)
        assert found.error.cosine == pytest.approx(one.error.cosine, rel=1e-5)
        assert 0.001 < found.error.relative_mse < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_bad_weight_is_named_with_its_matrix_and_its_place_in_the_source(
    tmp_path: Path, is_turned: bool, bad: float
) -> None:
    tensors = turned(experts(16)) if is_turned else experts(16)
    tensors[DOWN][2, 5, 7] = bad
    place = rf"'{re.escape(DOWN)}', matrix 2: 1 of {24 * 16} weights .* first at row 5, column 7;"
    with pytest.raises(NonFiniteError, match=place):
        converted(tmp_path, tensors, Scheme(8))


def sizes_of_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the bytes of each chunk on its way."""
    sizes, plain = list[int](), Conversion.convert

    def noting(self: Conversion, chunk: memoryview) -> object:
        sizes.append(len(chunk))
        return plain(self, chunk)

    monkeypatch.setattr(Conversion, "convert", noting)
    return sizes


@pytest.mark.parametrize(("is_turned", "largest"), [(False, 64 * 2), (True, 64 * 64 * 2)], ids=["a row", "a matrix"])
def test_memory_does_not_grow_with_a_stack(
    tmp_path: Path, is_turned: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    tensors = experts(32, hidden=64, count=50)
    sizes = sizes_of_chunks(monkeypatch)
    converted(tmp_path, turned(tensors) if is_turned else tensors, Scheme(8))
    assert max(sizes) == largest
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("shape", "megabytes"),
    [((64, 5120, 16384), 9 * 167.8 + 41.9), ((1 << 20, 16, 16), 9 * 16.8 + 33.6)],
    ids=["Llama-4: a matrix", "tiny matrices: a chunk"],
)
def test_the_memory_that_is_foretold_is_that_of_a_matrix_and_the_scales(
    tmp_path: Path, shape: tuple[int, ...], megabytes: float
) -> None:
    folder = write_checkpoint(tmp_path / "source", turned(experts(16)), shards=1)
    plan = make_plan(open_source(str(folder)), make_recipe(Scheme(256), "absmax", (), ()))
    tensor = next(tensor for tensor in plan.tensors if tensor.name == GATE_UP)
    spec = replace(tensor.spec, shape=shape)
    large = replace(tensor, spec=spec, stored=Scheme(256).stored(GATE_UP, spec.turned.shape, "BF16"))
    foretold = memory_needed(replace(plan, shards=(replace(plan.shards[0], tensors=(large,)),)))
    found = re.search(r"([\d,]+) MB for each other shard", foretold)
    assert found is not None
    assert float(found[1].replace(",", "")) == pytest.approx(megabytes, abs=1)


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_gpu_without_memory_gets_parts_of_a_matrix(
    tmp_path: Path, is_turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = turned(experts(16)) if is_turned else experts(16)
    whole, _ = converted(tmp_path / "whole", tensors, Scheme(8, symmetric=False))
    absmax, as_meant, failed = METHODS["absmax"], Conversion._as_meant, list[str]()

    def short_of_memory(weight: Tensor, *rest: Any) -> object:
        if len(weight) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return absmax(weight, *rest)

    def short_once(self: Conversion, weight: Tensor) -> Tensor:
        if self.plan.name not in failed:
            failed.append(self.plan.name)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return as_meant(self, weight)

    monkeypatch.setitem(METHODS, "absmax", short_of_memory)
    monkeypatch.setattr(Conversion, "_as_meant", short_once)
    found, _ = converted(tmp_path / "parts", tensors, Scheme(8, symmetric=False))
    assert set(failed) == tensors.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("is_turned", [False, True])
def test_the_folder_is_verified_and_described(tmp_path: Path, is_turned: bool) -> None:
    tensors = experts(64, hidden=96, count=2)
    biases = {f"{name}_bias": random(2, 8, seed=5) for name in tensors}
    _, manifest = converted(tmp_path, {**(turned(tensors) if is_turned else tensors), **biases}, Scheme(32))
    Checkpoint(tmp_path / "out").verify()
    assert manifest.sizes.quantized == 2
    assert manifest.sizes.bits_per_weight == 4 + 16 / 32
    done = CliRunner().invoke(cli.command, [str(tmp_path / "out"), "--verify", "--errors"])
    assert done.exit_code == 0
    assert "quantised  2 tensors, 4.5000 bits a weight" in done.output
    lines = [" ".join(line.split()) for line in done.output.splitlines()]
    shape = "[2, 96, 128]" if is_turned else "[2, 128, 96]"
    assert any(line.startswith(f"layers.*.mlp.experts.gate_up_proj 1 × {shape} int4 4.50") for line in lines)
    assert "layers.*.mlp.experts.down_proj_bias 1 × [2, 8] BF16 16.00 kept: not named .weight" in lines
    assert f"  {GATE_UP}\n" in done.output


def test_dequantize_gives_the_stack(tmp_path: Path) -> None:
    """As the runtime reads it: the stored tensors in, [E, N, K] out."""
    scheme = Scheme(8, symmetric=False)
    tensors = experts(13)
    found, _ = converted(tmp_path, turned(tensors), scheme)
    for name, stack in tensors.items():
        quantized = codec.Quantized(found[name + PACKED], found[name + SCALE], found[name + ZERO_POINT])
        values = codec.dequantize(quantized, stack.shape[-1], scheme, torch.bfloat16)
        assert values.shape == stack.shape
        assert (values - stack).square().mean() < 0.01 * stack.square().mean()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gpu_gives_the_same_bytes(tmp_path: Path, symmetric: bool, method: str) -> None:
    tensors = {**experts(300, hidden=200), **{f"other.{name}": stack for name, stack in turned(experts(61)).items()}}
    source = open_source(str(write_checkpoint(tmp_path / "source", tensors, shards=1)))
    plan = make_plan(source, make_recipe(Scheme(64, symmetric), method, (), ()))
    for device in ("cpu", "cuda"):
        convert(source, plan, tmp_path / device, [torch.device(device)])
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")


def test_an_interrupted_conversion_of_stacks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", turned(experts(16)), shards=2)
    convert_folder(source, tmp_path / "whole")
    plain, calls = Conversion.convert, list[str]()

    def stopping(self: Conversion, chunk: memoryview) -> object:
        calls.append(self.plan.name)
        if self.plan.name == DOWN:
            raise KeyboardInterrupt
        return plain(self, chunk)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Conversion, "convert", stopping)
        convert_folder(source, tmp_path / "out")
    assert DOWN in calls
    convert_folder(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
