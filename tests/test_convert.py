import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import contents, convert_folder, random, tiny_tensors, write_checkpoint
from safetensors.torch import load_file

from converter import pipeline
from converter.output import JOURNAL_NAME, LOCK_NAME, OutputDir
from formats import codec
from formats.errors import CheckpointError, NonFiniteError, OutputError, TemporaryError
from formats.files import lock
from formats.layout import Scheme
from formats.manifest import MANIFEST_NAME, read_manifest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def stored(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in out.glob("*.i4.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(16, symmetric=False), Scheme(-1)], ids=str)
def test_the_output_is_what_the_codec_says(source: Path, out: Path, scheme: Scheme) -> None:
    convert_folder(source, out, scheme)
    found = stored(out)
    for name, tensor in tiny_tensors().items():
        if not name.endswith("proj.weight"):
            assert torch.equal(found.pop(name), tensor)
            continue
        quantized = codec.quantize(tensor, scheme, torch.bfloat16)
        for key, expected in scheme.stored(name, *tensor.shape, "BF16").items():
            part = found.pop(key)
            assert list(part.shape) == list(expected.shape)
            assert any(torch.equal(part, one) for one in quantized.tensors())
    assert not found


def test_the_manifest_has_a_row_for_every_source_tensor(source: Path, out: Path) -> None:
    manifest = convert_folder(source, out)
    assert read_manifest(out) == manifest
    assert {row.name for row in manifest.tensors} == tiny_tensors().keys()
    assert all(row.reason for row in manifest.tensors)


def test_the_manifest_has_the_error_of_each_quantised_tensor(source: Path, out: Path) -> None:
    rows = {row.name: row for row in convert_folder(source, out).tensors}
    name = "model.layers.0.q_proj.weight"
    weight = tiny_tensors()[name].double()
    restored = codec.dequantize(codec.quantize(weight.bfloat16(), Scheme(8), torch.bfloat16), 24, Scheme(8)).double()
    error = rows[name].error
    assert error is not None
    assert error.relative_mse == pytest.approx(
        float((weight - restored).square().sum() / weight.square().sum()), rel=1e-5
    )
    assert rows["lm_head.weight"].error is None


def test_the_same_input_gives_the_same_bytes(source: Path, out: Path, tmp_path: Path) -> None:
    convert_folder(source, out)
    convert_folder(source, tmp_path / "again")
    assert contents(out) == contents(tmp_path / "again")


def test_blocks_of_rows_change_no_byte(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_folder(source, out, Scheme(8, symmetric=False))
    monkeypatch.setattr(pipeline, "BLOCK_WEIGHTS", 1)
    convert_folder(source, tmp_path / "blocks", Scheme(8, symmetric=False))
    assert contents(out) == contents(tmp_path / "blocks")


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gpu_gives_the_same_bytes(tmp_path: Path, symmetric: bool) -> None:
    tensors = {f"layers.{i}.proj.weight": random(256, 1000 + i, seed=i) for i in range(3)}
    source = write_checkpoint(tmp_path / "source", tensors, shards=1)
    convert_folder(source, tmp_path / "cpu", Scheme(128, symmetric))
    convert_folder(source, tmp_path / "gpu", Scheme(128, symmetric), device="cuda")
    assert contents(tmp_path / "cpu") == contents(tmp_path / "gpu")


def test_side_files_are_copied_and_the_configuration_names_the_format(source: Path, out: Path) -> None:
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    convert_folder(source, out)
    for name in ("LICENSE", "tokenizer.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "i4", "format_version": 1, "bits": 4, "group_size": 8, "symmetric": True,
    }  # fmt: skip
    assert config == json.loads((source / "config.json").read_text())


def test_the_index_leads_to_every_stored_tensor(source: Path, out: Path) -> None:
    convert_folder(source, out)
    index = json.loads((out / "model.safetensors.index.i4.json").read_text())
    assert index["weight_map"] == {n: p.name for p in out.glob("*.i4.safetensors") for n in load_file(p)}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored(out).values())


def test_one_shard_needs_no_index(tmp_path: Path, out: Path) -> None:
    convert_folder(write_checkpoint(tmp_path / "source", shards=1), out)
    assert not list(out.glob("*.index.*"))
    assert (out / "model.i4.safetensors").exists()


def test_a_shard_may_hold_nothing_that_is_quantised(tmp_path: Path, out: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {"a.weight": random(8, 8), "n.weight": random(8)})
    assert [row.quantized for row in convert_folder(source, out).tensors] == [True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_the_conversion(tmp_path: Path, out: Path, bad: float) -> None:
    weight = random(300, 24)
    weight[290, 5] = bad
    source = write_checkpoint(tmp_path / "source", {"a.weight": weight}, shards=1)
    with pytest.raises(NonFiniteError, match=r"'a\.weight': 1 of 7200 weights .* row 290, column 5"):
        convert_folder(source, out)
    assert set(contents(out)) == {JOURNAL_NAME}


def test_the_place_of_a_bad_weight_is_that_in_the_file(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BLOCK_WEIGHTS", 1)
    test_a_weight_that_is_not_finite_stops_the_conversion(tmp_path, out, float("nan"))


def test_a_bad_weight_in_a_kept_tensor_is_copied(tmp_path: Path, out: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {"norm.weight": torch.tensor([float("nan")])}, shards=1)
    convert_folder(source, out)
    assert stored(out)["norm.weight"].isnan().all()


def test_an_output_folder_with_foreign_files_is_refused(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write \(thesis.tex\)"):
        convert_folder(source, out, overwrite=True)
    assert contents(out) == {"thesis.tex": b"mine"}


def test_an_output_folder_that_is_a_file_is_refused(source: Path, out: Path) -> None:
    out.write_text("")
    with pytest.raises(OutputError, match="cannot be made a folder"):
        convert_folder(source, out)


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_an_output_folder_in_or_around_the_source_is_refused(source: Path, place: str) -> None:
    before = contents(source)
    with pytest.raises(OutputError, match="source folder"):
        convert_folder(source, source / place)
    assert contents(source) == before


def test_the_source_behind_a_link_is_still_the_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="source folder"):
        convert_folder(source, tmp_path / "link")


def test_a_finished_checkpoint_is_not_replaced_unasked(source: Path, out: Path) -> None:
    convert_folder(source, out)
    before = contents(out)
    with pytest.raises(OutputError, match="--overwrite"):
        convert_folder(source, out, Scheme(16))
    assert contents(out) == before


def test_overwrite_leaves_nothing_of_the_old_checkpoint(source: Path, out: Path, tmp_path: Path) -> None:
    convert_folder(source, out)
    other = write_checkpoint(tmp_path / "other", shards=1)
    convert_folder(other, out, Scheme(16), overwrite=True)
    convert_folder(other, tmp_path / "fresh", Scheme(16))
    assert contents(out) == contents(tmp_path / "fresh")


def test_after_any_interruption_the_same_command_gives_the_same_bytes(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_folder(source, tmp_path / "whole")
    replace, calls, stop_at = os.replace, 0, 0

    def failing(old: str, new: str) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    finished = False
    while not finished:
        calls, stop_at = 0, stop_at + 1
        try:
            convert_folder(source, out)
            finished = True
        except KeyboardInterrupt:
            assert not (out / MANIFEST_NAME).exists()
    assert stop_at > len(contents(tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


def test_leftovers_of_a_killed_run_are_removed(source: Path, out: Path, tmp_path: Path) -> None:
    convert_folder(source, tmp_path / "whole")
    out.mkdir()
    (out / JOURNAL_NAME).write_text('{"files": ["model-00001-of-00002.i4.safetensors"]}')
    (out / "model-00001-of-00002.i4.safetensors.0123abcd.partial").write_bytes(b"half")
    (out / LOCK_NAME).write_text("999999")
    convert_folder(source, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_in_use_is_refused_for_now(source: Path, out: Path) -> None:
    out.mkdir()
    with lock(out / LOCK_NAME), pytest.raises(TemporaryError, match="in use by process"):
        convert_folder(source, out)


def test_a_full_disk_is_noticed_before_the_work(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OutputError, match="1000 bytes are free"):
        convert_folder(source, out)


def test_a_disk_that_fills_up_leaves_no_partial_file(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: OutputDir, shard: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("formats.container.write_all", full)
    with pytest.raises(OutputError, match="No space left.*free some space"):
        convert_folder(source, out)
    assert set(contents(out)) == {JOURNAL_NAME}


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_tensor = pipeline.convert_tensor

    def touch_and_convert(*args: object) -> object:
        with (source / "model-00001-of-00002.safetensors").open("ab") as file:
            file.write(b"x")
        return convert_tensor(*args)

    monkeypatch.setattr(pipeline, "convert_tensor", touch_and_convert)
    with pytest.raises(CheckpointError, match="changed while"):
        convert_folder(source, out)
    assert MANIFEST_NAME not in contents(out)
