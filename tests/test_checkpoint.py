import hashlib
import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from checkpoints import convert_folder, random, write_checkpoint
from torch import Tensor

from formats import checkpoint
from formats.checkpoint import Checkpoint
from formats.container import Container
from formats.errors import CheckpointError, TemporaryError
from formats.layout import Scheme, TensorSpec
from formats.manifest import CARD_NAME, EVALUATION_NAME, MANIFEST_NAME, Manifest
from formats.records import from_json
from formats.tensors import TORCH_DTYPES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert_folder(write_checkpoint(tmp_path / "source"), tmp_path / "out", Scheme(16, symmetric=False))
    return tmp_path / "out"


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("*.i4.safetensors"))[0]


def test_a_whole_checkpoint_verifies(folder: Path) -> None:
    Checkpoint(folder).verify()


def test_one_flipped_bit_anywhere_is_reported(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 150)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                Checkpoint(folder).verify()
        path.write_bytes(whole)
    Checkpoint(folder).verify()


def test_the_card_and_files_that_are_not_listed_are_nobodys_business(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    (source / CARD_NAME).write_text("# A model\n")
    convert_folder(source, tmp_path / "out")
    (tmp_path / "out" / CARD_NAME).write_text("# Another text\n")
    (tmp_path / "out" / EVALUATION_NAME).write_text("{}\n")
    checkpoint = Checkpoint(tmp_path / "out")
    assert CARD_NAME in checkpoint.files
    assert checkpoint.verify() == len(checkpoint.files) - 1


def test_every_flipped_bit_and_every_cut_of_a_shard_is_found_by_loading(tmp_path: Path) -> None:
    convert_folder(write_checkpoint(tmp_path / "source", {"a.weight": random(8, 8)}, shards=1), tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    path = shard_of(tmp_path / "out")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            list(checkpoint.stream())
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            list(checkpoint.stream())
    path.write_bytes(whole)
    assert len(list(checkpoint.stream())) == 2


def respelt(folder: Path) -> Path:
    """A shard whose header is another text of the same, as another program may write it, or a flipped bit makes it."""
    convert_folder(write_checkpoint(folder / "source", {"é.weight": random(8, 8)}, shards=1), folder / "out")
    path = shard_of(folder / "out")
    whole = path.read_bytes()
    assert whole.count(rb"\u00e9") == 2
    path.write_bytes(whole.replace(rb"\u00e9", rb"\u00E9"))
    return path


def test_a_flipped_bit_that_leaves_the_meaning_of_a_header_is_found_by_loading(tmp_path: Path) -> None:
    path = respelt(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{path.name}: SHA-256 is \w+…, the manifest says \w+…; the file is"):
        list(Checkpoint(path.parent).stream())


def test_a_header_that_another_program_has_spelt_is_read(tmp_path: Path) -> None:
    path = respelt(tmp_path)
    manifest = json.loads((path.parent / MANIFEST_NAME).read_text())
    record = next(file for file in manifest["files"] if file["name"] == path.name)
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    reseal(path.parent, manifest)
    assert len(list(Checkpoint(path.parent).stream())) == 2


class OneThread(ThreadPoolExecutor):
    """A pool that says when it is to end."""

    ends = Event()

    def __init__(self, threads: int) -> None:
        super().__init__(1)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        self.ends.set()
        super().shutdown(wait)


@pytest.mark.parametrize("fails", [False, True])
def test_what_nobody_waits_for_any_more_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    begun, read = list[str](), Checkpoint._read

    def noting(self: Checkpoint, container: Container, name: str, *rest: Any) -> Tensor:
        begun.append(name)
        if len(begun) == 2:
            assert OneThread.ends.wait(30)
        if fails:
            raise CheckpointError("damaged")
        return read(self, container, name, *rest)

    OneThread.ends.clear()
    monkeypatch.setattr(Checkpoint, "_read", noting)
    monkeypatch.setattr(checkpoint, "ThreadPoolExecutor", OneThread)
    stream = Checkpoint(folder).stream()
    with pytest.raises(CheckpointError, match="damaged") if fails else nullcontext():
        next(stream)
    stream.close()
    assert len(begun) <= 2


def test_the_work_of_a_stream_grows_with_the_tensors_and_no_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"{i}.norm": torch.zeros(1) for i in range(300)} | {"a.weight": random(8, 8)}
    convert_folder(write_checkpoint(tmp_path / "source", tensors, shards=1), tmp_path / "out")
    asked, nbytes = list[int](), TensorSpec.nbytes.fget  # type: ignore[attr-defined]

    def counting(self: TensorSpec) -> int:
        asked.append(1)
        return int(nbytes(self))

    monkeypatch.setattr(TensorSpec, "nbytes", property(counting))
    assert len(list(Checkpoint(tmp_path / "out").stream())) == 302
    assert len(asked) < 20 * 300


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused_at_once(folder: Path, change: int) -> None:
    path = shard_of(folder)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(
        CheckpointError, match=f"{path.name}: is {len(data) + change} bytes, the manifest says {len(data)}"
    ):
        Checkpoint(folder)


def test_a_missing_shard_is_refused_at_once(folder: Path) -> None:
    shard_of(folder).unlink()
    with pytest.raises(CheckpointError, match="model-00001-of-00002.i4.safetensors: is missing"):
        Checkpoint(folder)


def test_an_edited_or_missing_side_file_concerns_verification_alone(folder: Path) -> None:
    (folder / "LICENSE").unlink()
    (folder / "tokenizer.json").write_text("edited")
    assert list(Checkpoint(folder).stream())
    with pytest.raises(CheckpointError, match=r"LICENSE: cannot be opened|tokenizer.json: SHA-256"):
        Checkpoint(folder).verify()


def reseal(folder: Path, manifest: dict[str, object]) -> None:
    (folder / MANIFEST_NAME).write_bytes(from_json(Manifest, manifest, "test").to_bytes())


def test_a_shard_that_differs_from_the_manifest_is_refused_by_tensor(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    row = next(row for row in manifest["tensors"] if row["name"] == "model.norm.weight")
    row["shape"] = [12]
    reseal(folder, manifest)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is BF16 \[24\], the manifest says BF16 \[12\]"):
        Checkpoint(folder).verify()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_bad_scale_is_refused_even_without_hashes(folder: Path, bad: float) -> None:
    name = "model.layers.0.q_proj.weight_scale"
    path = next(path for path in folder.glob("*.i4.safetensors") if name in Container(path).tensors)
    start = Container(path).tensors[name].start
    data = bytearray(path.read_bytes())
    data[start : start + 2] = torch.tensor([bad]).bfloat16().view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="q_proj.weight_scale: 1 of 32 scales"):
        list(Checkpoint(folder).stream(verify=False))


def test_a_kept_tensor_named_like_a_scale_may_be_zero(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {"a.weight": random(8, 8), "logit_weight_scale": torch.zeros(1)})
    convert_folder(source, tmp_path / "out")
    Checkpoint(tmp_path / "out").verify()


def test_the_stream_yields_every_stored_tensor_in_its_type(folder: Path) -> None:
    streamed = {name: spec for name, spec, _ in Checkpoint(folder).stream()}
    expected = {name: spec for specs in Checkpoint(folder).manifest.shards.values() for name, spec in specs.items()}
    assert streamed == expected
    assert all(spec.dtype in TORCH_DTYPES for spec in streamed.values())


@pytest.mark.parametrize("name", [MANIFEST_NAME, "model-00001-of-00002.i4.safetensors", "tokenizer.json"])
def test_a_file_behind_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: is a link to .*elsewhere, outside"):
        Checkpoint(folder).verify()


def test_a_row_with_the_digest_of_another_tensor_is_found(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    row = next(row for row in manifest["tensors"] if row["name"] == "model.norm.weight")
    row["sha256"] = ["0" * 64]
    reseal(folder, manifest)
    with pytest.raises(CheckpointError, match="tensor 'model.norm.weight' has the SHA-256 .* the manifest says 000000"):
        Checkpoint(folder).verify()


def test_more_shards_than_may_be_open_are_no_damage(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    whole, spare = Checkpoint(folder), os.dup(0)
    os.close(spare)  # the lowest that is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, limits[1]))
    try:
        with pytest.raises(
            TemporaryError, match=r"00002.i4.safetensors: cannot be opened \(Too many .*; raise `ulimit -n`"
        ):
            whole.verify()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
