"""Sources in block-scaled FP8 convert as the bf16 models that they stand for."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import add_to_config, convert_folder, random, stored, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter import chunks
from converter.source import open_source
from formats import container
from formats.errors import CheckpointError
from formats.layout import Scheme
from formats.manifest import read_manifest

ROWS, COLUMNS = 16, 24  # of a block
FP8 = {"quant_method": "fp8", "weight_block_size": [ROWS, COLUMNS], "activation_scheme": "dynamic"}
NAMES = ("model.layers.0.a.weight", "model.layers.0.b.weight", "lm_head.weight")


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 values, their scales, and the bf16 matrix that they mean."""
    down, across = -(-weight.shape[0] // ROWS), -(-weight.shape[1] // COLUMNS)
    scale = torch.rand(down, across, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1e-4
    wide = scale.repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS, 1)[: weight.shape[0], : weight.shape[1]]
    values = (weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scale, (values.float() * wide).bfloat16()


def checkpoints(folder: Path, shards: int) -> tuple[Path, Path]:
    """The same model in FP8 and in bf16."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {"model.norm.weight": random(40)}
    for i, name in enumerate(NAMES):
        values, scale, matrix = in_fp8(random(50, 40, seed=i))
        stored |= {name: values, f"{name}_scale_inv": scale}
        meant[name] = matrix
    stored["model.norm.weight"] = meant["model.norm.weight"]
    fp8 = write_checkpoint(folder / "fp8" / "source", stored, shards=shards)
    add_to_config(fp8, quantization_config=FP8)
    return fp8, write_checkpoint(folder / "bf16" / "source", meant, shards=1)


@pytest.mark.parametrize("chunk_bytes", [None, 1])
@pytest.mark.parametrize("shards", [1, 3, 7])  # with 7 the scales are in files of their own
@pytest.mark.parametrize("symmetric", [True, False])
def test_fp8_converts_as_what_it_means(
    tmp_path: Path, shards: int, symmetric: bool, chunk_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk_bytes:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    fp8, bf16 = checkpoints(tmp_path, shards)
    found = convert_folder(fp8, tmp_path / "out", Scheme(8, symmetric))
    expected = convert_folder(bf16, tmp_path / "expected", Scheme(8, symmetric))
    mine, theirs = stored(tmp_path / "out"), stored(tmp_path / "expected")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    rows = {row.name: (row.dtype, row.quantized, row.error, row.sha256) for row in found.tensors}
    assert rows == {row.name: (row.dtype, row.quantized, row.error, row.sha256) for row in expected.tensors}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "i4"
    assert read_manifest(tmp_path / "out") == found


def test_an_empty_matrix_is_kept(tmp_path: Path) -> None:
    fp8, _ = checkpoints(tmp_path, 1)
    tensors = load_file(fp8 / "model.safetensors")
    tensors |= {"e.weight": torch.zeros(0, 8).to(torch.float8_e4m3fn), "e.weight_scale_inv": torch.zeros(0, 1)}
    save_file(tensors, fp8 / "model.safetensors")
    rows = {row.name: row for row in convert_folder(fp8, tmp_path / "out").tensors}
    assert (rows["e.weight"].dtype, rows["e.weight"].shape, rows["e.weight"].quantized) == ("BF16", (0, 8), False)


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_a_header_is_parsed_once_however_many_matrices_need_it(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8, _ = checkpoints(tmp_path, shards)
    parsed: list[str] = []

    def counted(read: object, size: int, where: str) -> container.Header:
        parsed.append(where)
        return parse_header(read, size, where)  # type: ignore[arg-type]

    parse_header = container.parse_header
    monkeypatch.setattr(container, "parse_header", counted)
    convert_folder(fp8, tmp_path / "out")
    assert sorted(parsed) == sorted(map(str, fp8.glob("*.safetensors")))


def test_progress_counts_the_bytes_of_the_model(tmp_path: Path) -> None:
    fp8, _ = checkpoints(tmp_path, 3)
    source = open_source(str(fp8))
    assert source.nbytes == 2 * (3 * 50 * 40 + 40)
    assert torch.equal(source.read(NAMES[0]), in_fp8(random(50, 40, seed=0))[2])


def test_a_nan_is_found_at_its_place(tmp_path: Path) -> None:
    values, scale, _ = in_fp8(random(50, 40))
    values.view(torch.uint8)[33, 7] = 0x7F
    source = write_checkpoint(tmp_path / "source", {"a.weight": values, "a.weight_scale_inv": scale}, shards=1)
    add_to_config(source, quantization_config=FP8)
    with pytest.raises(CheckpointError, match=r"'a\.weight': 1 of 2000 weights .* row 33, column 7"):
        convert_folder(source, tmp_path / "out")


@pytest.mark.parametrize("scale", [None, torch.ones(3, 2), torch.ones(4, 2, dtype=torch.int32)])
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, scale: Tensor | None) -> None:
    stored = {"a.weight": in_fp8(random(50, 40))[0]}
    if scale is not None:
        stored["a.weight_scale_inv"] = scale
    source = write_checkpoint(tmp_path / "source", stored, shards=1)
    add_to_config(source, quantization_config=FP8)
    with pytest.raises(CheckpointError, match=r"'a\.weight' .* has the scales .*, expected F32 or .* \[4, 2\]"):
        open_source(str(source))


@pytest.mark.parametrize("size", [None, [128], [0, 128], "128"])
def test_fp8_without_blocks_is_refused(tmp_path: Path, size: object) -> None:
    source = write_checkpoint(tmp_path / "source", {"a.weight": random(8, 8)}, shards=1)
    add_to_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(CheckpointError, match=r"already quantised \(fp8\)"):
        open_source(str(source))
