"""An interrupted conversion goes on where it stopped, and ends with the bytes of an unbroken one."""

import json
import multiprocessing
import os
import random as chance
import signal
import sys
import warnings
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, convert_folder, random, write_checkpoint, write_index
from os_calls import convert_until, watched
from safetensors.torch import save_file

from converter.conversion import Conversion
from converter.convert import convert, make_recipe
from converter.folder import JOURNAL_NAME
from converter.journal import SHARDS_NAME
from converter.output import OutputDir
from converter.plan import make_plan
from converter.source import open_source
from formats.errors import OutputError, TemporaryError
from formats.layout import Scheme
from formats.manifest import MANIFEST_NAME

NAMES = [f"layers.{i}.proj.weight" for i in range(4)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", {name: random(16, 24, seed=i) for i, name in enumerate(NAMES)}, 4)


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    convert_folder(source, tmp_path / "whole")
    return contents(tmp_path / "whole")


def converted(monkeypatch: pytest.MonkeyPatch, stop_at: str | None = None) -> list[str]:
    """The names of the tensors that are converted from now on; at `stop_at` comes Ctrl-C."""
    names: list[str] = []
    convert = Conversion.convert

    def noting(self: Conversion, chunk: memoryview) -> object:
        if self.plan.name == stop_at:
            raise KeyboardInterrupt
        names.append(self.plan.name)
        return convert(self, chunk)

    monkeypatch.setattr(Conversion, "convert", noting)
    return names


@pytest.fixture
def half(source: Path, whole: dict[str, bytes], out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion that was interrupted behind its second shard."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        converted(patched, stop_at=NAMES[2])
        convert_folder(source, out)
    return out


def shard(out: Path, number: int) -> Path:
    return out / f"model-{number:05d}-of-00004.i4.safetensors"


def test_finished_shards_are_not_made_again(
    source: Path, whole: dict[str, bytes], half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = converted(monkeypatch)
    convert_folder(source, half)
    assert names == NAMES[2:]
    assert contents(half) == whole


def test_overwrite_goes_on_too(
    source: Path, whole: dict[str, bytes], half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = converted(monkeypatch)
    convert_folder(source, half, overwrite=True)
    assert names == NAMES[2:]
    assert contents(half) == whole


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "record"])
def test_a_damaged_shard_is_made_again(
    source: Path, whole: dict[str, bytes], half: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = shard(half, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "record":
        (half / SHARDS_NAME / f"{path.name}.json").write_text("{")
        path.unlink()
    elif damage == "lose":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    names = converted(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_folder(source, half)
    assert names == [NAMES[0], *NAMES[2:]]
    assert contents(half) == whole
    told = f"{half}: {path.name} changed since they were written; they are made again"
    assert [str(warning.message) for warning in caught] == ([told] if damage in ("flip", "cut") else [])


def test_another_option_is_refused_by_name(source: Path, half: Path) -> None:
    before = contents(half)
    with pytest.raises(OutputError, match="unfinished conversion with group_size 8 instead of 16; run it again as"):
        convert_folder(source, half, Scheme(16))
    assert contents(half) == before


def test_another_version_is_refused_by_name(source: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.convert.CONVERTER", "int4-convert 99")
    with pytest.raises(OutputError, match="converter 'int4-convert .*' instead of 'int4-convert 99'"):
        convert_folder(source, half)


def test_overwrite_begins_anew_with_another_option(source: Path, half: Path, tmp_path: Path) -> None:
    convert_folder(source, half, Scheme(16), overwrite=True)
    convert_folder(source, tmp_path / "fresh", Scheme(16))
    assert contents(half) == contents(tmp_path / "fresh")


def test_a_source_that_changed_since_is_refused_by_name(source: Path, half: Path) -> None:
    path = source / "model-00001-of-00004.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match=r"other files than model-00001-of-00004\.safetensors of the source"):
        convert_folder(source, half)
    convert_folder(source, half, overwrite=True)


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, stop_at: str) -> None:
    """Convert until the tensor `stop_at`, which has a shard of its own."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        converted(patched, stop_at=stop_at)
        convert_folder(source, out)


def test_files_that_are_counted_otherwise_are_refused(
    source: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file becomes the last: shards that are written would be of other files."""
    (source / "model-00002-of-00004.safetensors").rename(source / "other.safetensors")
    files = {name: f"model-{i:05d}-of-00004.safetensors" for i, name in enumerate(NAMES, 1)}
    write_index(source, {**files, NAMES[1]: "other.safetensors"})
    with pytest.raises(OutputError, match=r"other files than model-00002-of-00004\.safetensors of the source"):
        convert_folder(source, half)


def test_an_index_by_which_shards_would_hold_other_tensors_is_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in "mn":
        save_file({f"{name}.weight": random(16, 24)}, source / f"{name}.safetensors")
    write_index(source, {"m.weight": "m.safetensors", "n.weight": "n.safetensors"})
    interrupt(monkeypatch, source, out, "n.weight")
    (source / "n.safetensors").rename(source / "c.safetensors")
    write_index(source, {"m.weight": "m.safetensors", "n.weight": "c.safetensors"})
    with pytest.raises(
        OutputError, match=r"model-00001-of-00002\.i4\.safetensors would hold other tensors by the index"
    ):
        convert_folder(source, out)


def test_a_configuration_by_which_tensors_would_be_stored_otherwise_is_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"h.{i}.c_fc.weight": random(16, 24, seed=i) for i in range(2)}
    source = write_checkpoint(tmp_path / "source", tensors, config={"model_type": "gpt2"})
    interrupt(monkeypatch, source, out, "h.1.c_fc.weight")
    (source / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OutputError, match=r"by the index and config\.json of the source"):
        convert_folder(source, out)
    convert_folder(source, out, overwrite=True)
    convert_folder(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_shard_is_made_again_if_its_scales_may_have_been_others(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scales of the first shard stand in the second, which no record vouches for."""
    tensors = {
        "a.weight": random(16, 24).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(2, 3),
        "b.weight": random(16, 24, seed=1),
    }
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    source = write_checkpoint(tmp_path / "source", tensors, config=fp8)
    files = [source / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a.weight": tensors.pop("a.weight")}, files[0])
    save_file(tensors, files[1])
    write_index(source, {"a.weight": files[0].name, **dict.fromkeys(tensors, files[1].name)})
    interrupt(monkeypatch, source, out, "b.weight")
    save_file({**tensors, "a.weight_scale_inv": torch.full((2, 3), 2.0)}, files[1])
    convert_folder(source, out)
    convert_folder(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_records_that_cannot_be_read_at_the_end_are_named(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another process wrote them into a shared folder that shows old listings."""
    opened = open_source(str(source))
    plan = make_plan(opened, make_recipe(Scheme(8), "absmax", (), ()))
    with OutputDir(out, opened, plan) as folder, pytest.raises(TemporaryError, match=r"model-00001-of-00004"):
        folder.finish()


def test_a_run_that_was_about_to_finish_makes_no_shard_again(
    source: Path, whole: dict[str, bytes], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(old: Path, new: Path) -> None:
        if Path(new).name == MANIFEST_NAME:
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", interrupted)
        convert_folder(source, out)
    names = converted(monkeypatch)
    convert_folder(source, out)
    assert names == []
    assert contents(out) == whole


def test_shards_in_any_order_give_the_same_bytes(source: Path, whole: dict[str, bytes], out: Path) -> None:
    opened = open_source(str(source))
    plan = make_plan(opened, make_recipe(Scheme(8), "absmax", (), ()))
    convert(opened, plan, out, [torch.device("cpu")] * 3)
    assert contents(out) == whole


def test_an_error_in_one_shard_ends_the_others(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_source(str(source))
    plan = make_plan(opened, make_recipe(Scheme(8), "absmax", (), ()))
    record = OutputDir.record

    def failing(self: OutputDir, written: object) -> None:
        raise OutputError("disk gone")

    monkeypatch.setattr(OutputDir, "record", failing)
    with pytest.raises(OutputError, match="disk gone"):
        convert(opened, plan, out, [torch.device("cpu")] * 2)
    assert not [name for name in contents(out) if name.endswith("safetensors") or "partial" in name]
    monkeypatch.setattr(OutputDir, "record", record)
    convert(opened, plan, out, [torch.device("cpu")])


@pytest.fixture(scope="module")
def processes() -> Any:
    """Where processes begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["os_calls"])
    with pytest.MonkeyPatch.context() as patched:  # without it the server finds no `os_calls`, and says nothing
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def test_a_conversion_that_is_killed_again_and_again_ends_the_same(
    source: Path, whole: dict[str, bytes], out: Path, processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random calls to the operating system: between them nothing changes that another process could see."""
    rounds = int(os.environ.get("KILL_ROUNDS", "20"))
    calls: list[str] = []
    with monkeypatch.context() as patched:
        for name, call in watched(lambda number, name: calls.append(name)).items():
            patched.setattr(os, name, call)
        convert_folder(source, out.parent / "counted")
    chances = chance.Random(0)
    kills = unfinished = 0
    for _ in range(rounds):
        process = processes.Process(target=convert_until, args=(source, out, chances.randint(1, len(calls))))
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        found = contents(out) if out.exists() else {}
        unfinished += JOURNAL_NAME in found
        assert all(found[name] == whole[name] for name in found.keys() & whole.keys())
        if MANIFEST_NAME in found:
            assert {name for name in found if not name.startswith(".")} == whole.keys()
            for path in out.iterdir():
                if path.is_file():
                    path.unlink()
    assert min(kills, unfinished) > rounds // 4
    convert_folder(source, out)
    assert contents(out) == whole


def test_the_journal_and_records_hold_no_time_and_no_host(half: Path) -> None:
    records = [*(half / SHARDS_NAME).iterdir()]
    assert len(records) == 2
    for path in records:
        assert json.loads(path.read_text()).keys() == {"file", "source", "tensors"}
