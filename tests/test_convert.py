import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from checkpoints import contents, convert_folder, random, stored, tiny_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from converter import chunks, conversion
from converter.conversion import Conversion
from converter.convert import convert, make_recipe
from converter.folder import JOURNAL_NAME, LOCK_NAME
from converter.journal import SHARDS_NAME
from converter.passage import Copied
from converter.plan import make_plan
from converter.prepared import FOLDER_NAME
from converter.source import open_source
from formats import codec
from formats.checkpoint import Checkpoint
from formats.devices import BLOCK_WEIGHTS, parse_devices
from formats.errors import CheckpointError, NonFiniteError, OutputError, TemporaryError
from formats.files import lock
from formats.layout import Scheme
from formats.manifest import EVALUATION_NAME, MANIFEST_NAME, FileRecord, read_manifest
from formats.tensors import bytes_of, spec_of


def begin(source: Path, out: Path) -> None:
    """An interrupted conversion of which nothing but its journal is left."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Copied, "convert", lambda self, chunk: (_ for _ in ()).throw(KeyboardInterrupt))
        convert_folder(source, out)


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(16, symmetric=False), Scheme(-1)], ids=str)
def test_the_output_is_what_the_codec_says(source: Path, out: Path, scheme: Scheme) -> None:
    convert_folder(source, out, scheme)
    found = stored(out)
    for name, tensor in tiny_tensors().items():
        if not name.endswith("proj.weight"):
            assert torch.equal(found.pop(name), tensor)
            continue
        quantized = codec.quantize(tensor, scheme, torch.bfloat16)
        for key, expected in scheme.stored(name, tuple(tensor.shape), "BF16").items():
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
    monkeypatch.setitem(BLOCK_WEIGHTS, "cpu", 1)
    convert_folder(source, tmp_path / "blocks", Scheme(8, symmetric=False))
    assert contents(out) == contents(tmp_path / "blocks")


@pytest.mark.parametrize(("symmetric", "rows"), [(True, 1), (False, 8)])
def test_very_wide_rows_go_one_by_one_where_no_zero_points_join_them(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symmetric: bool, rows: int
) -> None:
    convert_folder(source, out, Scheme(8, symmetric))
    monkeypatch.setitem(BLOCK_WEIGHTS, "cpu", 1)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    seen: set[int] = set()
    found = conversion.sums
    monkeypatch.setattr(conversion, "sums", lambda block, *rest: (seen.add(len(block)), found(block, *rest))[1])
    convert_folder(source, tmp_path / "wide", Scheme(8, symmetric))
    assert max(seen) == rows
    assert contents(out) == contents(tmp_path / "wide")


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gpu_gives_the_same_bytes(tmp_path: Path, symmetric: bool) -> None:
    tensors = {f"layers.{i}.proj.weight": random(256, 1000 + i, seed=i) for i in range(3)}
    source = write_checkpoint(tmp_path / "source", tensors, shards=1)
    convert_folder(source, tmp_path / "cpu", Scheme(128, symmetric))
    convert_folder(source, tmp_path / "gpu", Scheme(128, symmetric), device="cuda")
    assert contents(tmp_path / "cpu") == contents(tmp_path / "gpu")


@pytest.mark.gpu
def test_every_gpu_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.proj.weight": random(256, 1000 + i, seed=i) for i in range(9)}
    source = write_checkpoint(tmp_path / "source", tensors, shards=9)
    convert_folder(source, tmp_path / "cpu", Scheme(128))
    opened = open_source(str(source))
    plan = make_plan(opened, make_recipe(Scheme(128), "absmax", (), ()))
    convert(opened, plan, tmp_path / "gpus", parse_devices("all"))
    assert contents(tmp_path / "cpu") == contents(tmp_path / "gpus")


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
    monkeypatch.setitem(BLOCK_WEIGHTS, "cpu", 1)
    test_a_weight_that_is_not_finite_stops_the_conversion(tmp_path, out, float("nan"))


def test_a_bad_weight_in_a_kept_tensor_is_copied(tmp_path: Path, out: Path) -> None:
    tensors = {"a.weight": random(8, 8), "norm.weight": torch.tensor([float("nan")])}
    source = write_checkpoint(tmp_path / "source", tensors, shards=1)
    convert_folder(source, out)
    assert stored(out)["norm.weight"].isnan().all()


def test_an_output_folder_with_foreign_files_is_refused(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write, .* \(thesis.tex\)"):
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


def interrupt_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a KeyboardInterrupt of the given moment before or after a file changes its name or goes."""
    moments = count(1)

    def interruptible(step: Callable[..., None]) -> Callable[..., None]:
        def interrupted(*args: object) -> None:
            if next(moments) == moment:
                raise KeyboardInterrupt
            step(*args)
            if next(moments) == moment:
                raise KeyboardInterrupt

        return interrupted

    for name in ("replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, interruptible(getattr(os, name)))


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_after_any_interruption_the_same_command_gives_the_same_bytes(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    old = write_checkpoint(tmp_path / "old", shards=1)
    (old / "2_Dense").mkdir()
    (old / "2_Dense" / "config.json").write_text("{}")
    convert_folder(old, tmp_path / "before")
    convert_folder(source, tmp_path / "whole")
    before, whole = contents(tmp_path / "before"), contents(tmp_path / "whole")
    finished = False
    for moment in count(1):
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(tmp_path / "before", out)
        with monkeypatch.context() as patched:
            interrupt_at(moment, patched)
            try:
                convert_folder(source, out, overwrite=overwrite)
                finished = True
            except KeyboardInterrupt:
                pass
        (out / LOCK_NAME).unlink(missing_ok=True)  # may stay when its own removal is interrupted
        if MANIFEST_NAME in contents(out):
            assert contents(out) in (before, whole)
        if overwrite or MANIFEST_NAME not in contents(out):
            convert_folder(source, out, overwrite=overwrite)
        assert contents(out) == whole
        assert not (out / "2_Dense").exists()
        if finished:
            break
    assert moment > 4 * len(whole)


def test_leftovers_of_a_killed_run_are_removed(source: Path, out: Path, tmp_path: Path) -> None:
    convert_folder(source, tmp_path / "whole")
    begin(source, out)
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config.json.0123abcd.partial").write_bytes(b"half")
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
    def full(fd: int, data: memoryview, position: int) -> int:
        if position > 500:  # not the journal
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, position)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left.*free some space"):
        convert_folder(source, out)
    assert set(contents(out)) == {JOURNAL_NAME}


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = Conversion.convert

    def touch_and_convert(self: Conversion, chunk: memoryview) -> object:
        with (source / "model-00002-of-00002.safetensors").open("ab") as file:
            file.write(b"x")
        return convert(self, chunk)

    monkeypatch.setattr(Conversion, "convert", touch_and_convert)
    with pytest.raises(CheckpointError, match="changed while"):
        convert_folder(source, out)
    assert MANIFEST_NAME not in contents(out)


def test_the_old_manifest_goes_before_any_other_file(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_folder(source, out)
    unlink = os.unlink

    def checked(path: Path) -> None:
        assert path.name == LOCK_NAME or not (out / MANIFEST_NAME).exists()
        unlink(path)

    monkeypatch.setattr(os, "unlink", checked)
    convert_folder(write_checkpoint(tmp_path / "other", shards=1), out, overwrite=True)


def test_another_command_removes_what_an_interrupted_overwrite_left(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_folder(source, out)
    other = write_checkpoint(tmp_path / "other", shards=1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert_folder(other, out, overwrite=True)
    with pytest.raises(OutputError, match="unfinished conversion with source id 'source' instead of 'other'"):
        convert_folder(other, out)
    convert_folder(other, out, overwrite=True)
    convert_folder(other, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_folder_of_the_old_checkpoint_may_be_a_file_of_the_new(source: Path, out: Path, tmp_path: Path) -> None:
    old = write_checkpoint(tmp_path / "old")
    (old / "vocab").mkdir()
    (old / "vocab" / "a.txt").write_text("a")
    (source / "vocab").write_text("b")
    convert_folder(old, out)
    convert_folder(source, out, overwrite=True)
    assert (out / "vocab").read_text() == "b"


def test_a_file_of_the_user_is_kept_even_if_the_manifest_lists_it(source: Path, out: Path) -> None:
    manifest = convert_folder(source, out)
    (out / "thesis.tex").write_text("mine")
    forged = replace(manifest, files=(*manifest.files, FileRecord("thesis.tex", 4, "0" * 64)))
    (out / MANIFEST_NAME).write_bytes(forged.to_bytes())
    with pytest.raises(OutputError, match="thesis.tex"):
        convert_folder(source, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "mine"


def test_a_file_that_changed_since_is_not_overwritten(source: Path, out: Path) -> None:
    convert_folder(source, out)
    (out / "tokenizer.json").write_text("edited")
    before = contents(out)
    with pytest.raises(OutputError, match=r"changed since \(tokenizer.json\)"):
        convert_folder(source, out, overwrite=True)
    assert contents(out) == before


def test_a_file_of_the_user_in_an_unfinished_folder_is_kept(source: Path, out: Path) -> None:
    begin(source, out)
    journal = json.loads((out / JOURNAL_NAME).read_text())
    journal["files"] = [{"name": "LICENSE", "size": 4, "sha256": "0" * 64}]
    (out / JOURNAL_NAME).write_text(json.dumps(journal))
    (out / "LICENSE").write_text("mine")
    with pytest.raises(OutputError, match="LICENSE"):
        convert_folder(source, out)
    assert (out / "LICENSE").read_text() == "mine"


@pytest.mark.parametrize(
    "journal", ["{", "null", "{}", '{"files": 5}', '{"files": [["x"]]}', '{"files": [{"name": "a"}]}']
)
def test_a_damaged_journal_is_an_output_error(source: Path, out: Path, journal: str) -> None:
    out.mkdir()
    (out / JOURNAL_NAME).write_text(journal)
    with pytest.raises(OutputError, match="cannot tell which files are ours .*remove the folder"):
        convert_folder(source, out)


def test_a_damaged_manifest_is_not_overwritten(source: Path, out: Path) -> None:
    convert_folder(source, out)
    (out / MANIFEST_NAME).write_bytes((out / MANIFEST_NAME).read_bytes()[:-5])
    before = contents(out)
    with pytest.raises(OutputError, match="cannot tell which files are ours .*remove the folder"):
        convert_folder(source, out, overwrite=True)
    assert contents(out) == before


def test_the_figures_of_a_checkpoint_that_is_overwritten_go_with_it(source: Path, out: Path) -> None:
    digest = convert_folder(source, out).digest
    (out / EVALUATION_NAME).write_text(json.dumps({"checkpoint": digest, "perplexity": 5.0}))
    convert_folder(source, out, Scheme(16), overwrite=True)
    assert not (out / EVALUATION_NAME).exists()


@pytest.mark.parametrize("text", ['{"accuracy": 1}', "[]", ""])
def test_an_evaluation_of_somebody_elses_is_not_removed(source: Path, out: Path, text: str) -> None:
    convert_folder(source, out)
    (out / EVALUATION_NAME).write_text(text)
    with pytest.raises(OutputError, match=r"did not write.*evaluation\.json"):
        convert_folder(source, out, overwrite=True)
    assert (out / EVALUATION_NAME).read_text() == text


@pytest.mark.parametrize("name", [SHARDS_NAME, FOLDER_NAME])
def test_a_link_in_the_place_of_a_hidden_folder_is_not_followed(source: Path, out: Path, name: str) -> None:
    theirs = out.parent / "theirs"
    theirs.mkdir()
    (theirs / "layer-00000.safetensors").write_text("precious")
    (theirs / "model.i4.safetensors.json").write_text("precious")
    out.mkdir()
    (out / name).symlink_to(theirs)
    with pytest.raises(OutputError, match=f"holds files that int4-convert did not write.*{name}"):
        convert_folder(source, out)
    assert len(list(theirs.iterdir())) == 2


def test_of_the_records_folder_only_records_go(source: Path, out: Path) -> None:
    (out / SHARDS_NAME).mkdir(parents=True)
    (out / SHARDS_NAME / "mine.json").write_text("precious")
    convert_folder(source, out)
    assert [path.name for path in (out / SHARDS_NAME).iterdir()] == ["mine.json"]


def test_a_link_in_the_output_folder_is_not_ours(source: Path, out: Path, tmp_path: Path) -> None:
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("theirs")
    begin(source, out)
    (out / "1_Pooling").symlink_to(tmp_path / "theirs")
    with pytest.raises(OutputError, match=r"did not write, .* \(1_Pooling\)"):
        convert_folder(source, out)
    assert (tmp_path / "theirs" / "config.json").read_text() == "theirs"


def test_a_full_disk_spares_the_old_checkpoint(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_folder(source, out)
    before = contents(out)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    with pytest.raises(OutputError, match="bytes are free"):
        convert_folder(source, out, overwrite=True)
    assert contents(out) == before


def test_weights_that_overflow_as_int4_are_refused_by_name(tmp_path: Path, out: Path) -> None:
    extreme = torch.full((8, 8), 3.4e38)
    extreme[:, ::2] *= -1
    source = write_checkpoint(tmp_path / "source", {"a.weight": extreme}, shards=1)
    with pytest.raises(NonFiniteError, match=r"'a\.weight': its weights overflow"):
        convert_folder(source, out, Scheme(8, symmetric=False))


def test_the_error_of_a_tensor_has_six_digits(source: Path, out: Path) -> None:
    errors = [row.error.relative_mse for row in convert_folder(source, out).tensors if row.error]
    assert errors == [float(f"{error:.6g}") for error in errors]


def test_safetensors_of_a_subfolder_are_copied(source: Path, out: Path) -> None:
    (source / "2_Dense").mkdir()
    save_file({"linear.weight": random(8, 8)}, source / "2_Dense" / "model.safetensors")
    convert_folder(source, out)
    name = "2_Dense/model.safetensors"
    assert (out / name).read_bytes() == (source / name).read_bytes()
    Checkpoint(out).verify()


def test_hidden_files_of_others_stay_and_are_in_nobodys_way(source: Path, out: Path) -> None:
    for name in (".DS_Store", ".git/config"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("theirs")
    convert_folder(source, out)
    convert_folder(source, out, Scheme(16), overwrite=True)
    assert contents(out)[".git/config"] == contents(out)[".DS_Store"] == b"theirs"


def test_tensors_in_any_order_and_at_any_byte_are_read(tmp_path: Path, out: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {"a.weight": random(8, 16)}, shards=1)
    tensors = {"odd": torch.ones(1, dtype=torch.uint8), "b.weight": random(4, 8, dtype=torch.float32),
               "a.weight": random(8, 16)}  # fmt: skip
    data, entries = b"", {}
    for name, tensor in tensors.items():
        octets = bytes(bytes_of(tensor))
        spec = spec_of(tensor)
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [len(data), len(data) + len(octets)]}
        data += octets
    for padding in range(8):
        header = json.dumps(dict(sorted(entries.items()))).encode() + b" " * padding
        (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
        convert_folder(source, out / str(padding))
        found = stored(out / str(padding))
        for name in ("a.weight", "b.weight"):
            quantized = codec.quantize(tensors[name], Scheme(8), torch.bfloat16)
            assert torch.equal(found[f"{name}_packed"], quantized.packed)
            assert torch.equal(found[f"{name}_scale"], quantized.scale)


def test_names_of_tensors_are_never_paths(tmp_path: Path, out: Path) -> None:
    names = ["../x.weight", "a/../../b.weight", "~/z.weight", str(tmp_path / "trap.weight")]
    source = write_checkpoint(tmp_path / "source", {name: random(8, 8) for name in names}, shards=2)
    before = contents(source)
    assert all(row.quantized for row in convert_folder(source, out).tensors)
    Checkpoint(out).verify()
    assert contents(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_scalars_and_empty_tensors_are_kept(tmp_path: Path, out: Path) -> None:
    tensors = {"a.weight": random(8, 8), "scalar": torch.tensor(2.5), "none.weight": torch.empty(0, 8).bfloat16()}
    source = write_checkpoint(tmp_path / "source", tensors, shards=1)
    reasons = {row.name: row.reason for row in convert_folder(source, out).tensors}
    assert reasons == {"a.weight": "linear layer", "scalar": "0-D", "none.weight": "empty"}
    Checkpoint(out).verify()
    assert stored(out)["scalar"].item() == 2.5
    assert stored(out)["none.weight"].shape == (0, 8)
