import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import add_to_config, random, tiny_tensors, write_checkpoint, write_index
from safetensors.torch import save_file

from converter.source import open_source
from formats.errors import CheckpointError, Int4Warning, UsageError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


def weight_map(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def double_a_tensor(folder: Path) -> None:
    save_file(
        {**{n: t for i, (n, t) in enumerate(tiny_tensors().items()) if i % 2}, "model.norm.weight": random(24)},
        folder / TWO,
    )


def only_pickles(folder: Path) -> None:
    for name in (ONE, TWO, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def cut_in_half(folder: Path) -> None:
    os.truncate(folder / ONE, (folder / ONE).stat().st_size // 2)


def pad(folder: Path) -> None:
    with (folder / ONE).open("ab") as file:
        file.write(b"\0")


def fifo(folder: Path) -> None:
    (folder / ONE).unlink()
    os.mkfifo(folder / ONE)


def folder_for_shard(folder: Path) -> None:
    (folder / ONE).unlink()
    (folder / ONE).mkdir()


def socket_for_shard(folder: Path) -> None:
    (folder / ONE).unlink()
    os.mknod(folder / ONE, stat.S_IFSOCK)


def link_out(folder: Path) -> None:
    (folder / ONE).rename(folder.parent / "elsewhere")
    (folder / ONE).symlink_to(folder.parent / "elsewhere")


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard cut short": (cut_in_half, "model-00001.*header describes"),
    "shard padded": (pad, "model-00001.*header describes"),
    "shard is a fifo": (fifo, "not a regular file"),
    "shard is a folder": (folder_for_shard, "not a regular file"),
    "shard is a socket": (socket_for_shard, "cannot be opened"),
    "shard is a link out of the folder": (link_out, "outside"),
    "shard missing": (lambda f: (f / TWO).unlink(), f"names {TWO} which are not in the folder"),
    "only pickled weights": (only_pickles, r"found pytorch_model.bin\. Only safetensors"),
    "index lists a tensor that no shard holds": (
        lambda f: write_index(f, {**weight_map(f), "ghost.weight": ONE}), "no shard holds: ghost.weight"),
    "index lacks a tensor": (
        lambda f: write_index(f, {n: s for n, s in weight_map(f).items() if n != "model.norm.weight"}),
        "does not list.*model.norm.weight"),
    "index names another shard for a tensor": (
        lambda f: write_index(f, {**weight_map(f), "model.norm.weight": TWO}), "lists elsewhere.*model.norm.weight"),
    "tensor in two shards": (double_a_tensor, "'model.norm.weight' is in model-00001.* and in model-00002"),
    "index leaves the folder": (
        lambda f: write_index(f, {"a": "../other/model.safetensors"}), "could leave its folder"),
    "index names a pickle": (lambda f: write_index(f, {"a": "pytorch_model.bin"}), "expected only .safetensors"),
    "index without weight_map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index with a list for a map": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "has no weight_map"),
    "index with a number for a file": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 5}}'), "no weight_map"),
    "index is an array": (lambda f: (f / INDEX).write_text("[]"), "found a JSON list, expected an object"),
    "index names a file that no disk can hold": (
        lambda f: write_index(f, {"a": "x" * 5000 + ".safetensors"}), "is too long; shorten it"),
    "index is no json": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "index with duplicate keys": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), "duplicate key 'a'"),
    "config says quantised": (
        lambda f: add_to_config(f, quantization_config={"quant_method": "gptq"}), "quantised .gptq: bits is None"),
    "config says int4 of this format": (
        lambda f: add_to_config(f, quantization_config={"quant_method": "i4"}), "is what int4-convert writes; give"),
    "side file whose half-made name no disk can hold": (
        lambda f: (f / ("a" * 249)).write_text(""), "its name is over 238 bytes; shorten it"),
    "config says quantised by MLX": (
        lambda f: add_to_config(f, quantization={"group_size": 64, "bits": 8}), r"already quantised \(mlx: bits is 8"),
    "stale shard": (lambda f: save_file({"x": random(2)}, f / "model-00003-of-00003.safetensors"),
        "holds model-00003-of-00003.safetensors beside the weights of model.safetensors.index.json"),
    "single file beside an index": (lambda f: save_file({"x": random(2)}, f / "model.safetensors"),
        "holds model.safetensors beside the weights of model.safetensors.index.json"),
    "side file is a fifo": (lambda f: os.mkfifo(f / "vocab.txt"), "vocab.txt: is not a regular file"),
    "side file is a link to nothing": (lambda f: (f / "a.txt").symlink_to("nothing"), "a.txt: cannot be opened"),
    "side file is a link to itself": (lambda f: (f / "a.txt").symlink_to("a.txt"), "a.txt: cannot be opened"),
    "side file is a link out of the folder": (lambda f: (f / "a.txt").symlink_to("/etc/hostname"), "outside"),
    "side file with an undecodable name": (
        lambda f: (f / os.fsdecode(b"caf\xe9.txt")).write_text(""), "is not printable UTF-8; rename the file"),
    "subfolder is a link": (lambda f: (f / "sub").symlink_to(f.parent), "sub: is a link to a folder"),
    "config is no json": (lambda f: (f / "config.json").write_text("nope"), "config.json: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_bad_source_is_refused_with_its_reason(kind: str, folder: Path) -> None:
    spoil, message = BAD_SOURCES[kind]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a.qweight", torch.zeros(2, 2, dtype=torch.int32)),
        ("a.weight_packed", torch.zeros(2, 2, dtype=torch.int32)),
        ("a.weight_scale_inv", torch.zeros(2, 2)),
        ("a.weight", torch.zeros(2, 2).to(torch.float8_e4m3fn)),
        ("a.weight", torch.zeros(2, 2, dtype=torch.int8)),
        ("a.weight", torch.zeros(2, 2, dtype=torch.uint8)),
    ],
)
def test_tensors_of_quantised_models_are_refused(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already quantised"):
        open_source(str(write_checkpoint(tmp_path / "source", {name: tensor}, shards=1)))


def test_packed_matrices_of_mlx_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(8, 1, dtype=torch.uint32), "a.scales": random(8, 2), "a.biases": random(8, 2)}
    with pytest.raises(CheckpointError, match=r"'a\.weight' .* already quantised"):
        open_source(str(write_checkpoint(tmp_path / "source", tensors, shards=3)))


def test_a_shard_beside_a_single_file_without_an_index_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", shards=1)
    save_file({"x": random(2)}, folder / ONE)
    with pytest.raises(CheckpointError, match=f"holds {ONE} beside the weights of model.safetensors"):
        open_source(str(folder))


def test_all_missing_shards_are_named_at_once(folder: Path) -> None:
    (folder / ONE).unlink()
    (folder / TWO).unlink()
    with pytest.raises(CheckpointError, match=f"{ONE}, {TWO}"):
        open_source(str(folder))


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "other.safetensors"]
)
def test_safetensors_of_other_names_are_left_out(folder: Path, name: str) -> None:
    save_file({"other": random(2)}, folder / name)
    source = open_source(str(folder))
    assert set(source.shards) == {ONE, TWO}
    assert name not in source.side_files


def test_a_name_that_begins_with_a_tilde_is_a_name(folder: Path) -> None:
    (folder / "~$notes.txt").write_text("x")
    assert "~$notes.txt" in open_source(str(folder)).side_files


def test_safetensors_of_a_subfolder_are_side_files_with_their_index(folder: Path) -> None:
    (folder / "2_Dense").mkdir()
    names = ["2_Dense/model.safetensors", "2_Dense/model.safetensors.index.json"]
    for name in [*names, "2_Dense/pytorch_model.bin"]:
        (folder / name).write_text("{}")
    assert [name for name in open_source(str(folder)).side_files if "/" in name] == names


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_subfolder_that_cannot_be_listed_is_refused(folder: Path) -> None:
    (folder / "sub").mkdir(mode=0)
    with pytest.raises(CheckpointError, match="sub: cannot be listed"):
        open_source(str(folder))


def test_side_files_are_all_that_is_not_weights(folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    for name in ("model.gguf", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (folder / name).write_text("")
    assert open_source(str(folder)).side_files == ("LICENSE", "config.json", "tokenizer.json", "1_Pooling/config.json")


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert set(open_source(str(snapshot)).shards) == {ONE, TWO}


def test_a_configuration_may_hold_infinity(folder: Path) -> None:
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_source(str(folder)).config == {"time_step_limit": [0.0, float("inf")]}


def test_weights_in_a_subfolder_that_the_index_names_are_no_side_files(folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / ONE).rename(folder / "parts" / ONE)
    write_index(folder, {name: name_ if name_ != ONE else f"parts/{ONE}" for name, name_ in weight_map(folder).items()})
    source = open_source(str(folder))
    assert set(source.shards) == {f"parts/{ONE}", TWO}
    assert f"parts/{ONE}" not in source.side_files


def test_a_weight_file_is_no_model(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a file; give the folder that holds it"):
        open_source(str(folder / ONE))


def test_a_name_that_is_too_long_for_a_folder_is_none_of_a_model_either() -> None:
    with pytest.raises(UsageError, match="neither a folder here nor a Hub id"):
        open_source("a" * 300)


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(UsageError, match="leave --revision out"):
        open_source(str(folder), "main")


def test_no_pickle_and_no_code_of_the_checkpoint_runs(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    (folder / "modeling.py").write_text(f"open({str(trap)!r}, 'w')")
    add_to_config(folder, auto_map={"AutoModel": "modeling.Model"})
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    open_source(str(folder))
    assert not trap.exists()


def with_total_size(folder: Path, size: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map(folder)}))


@pytest.mark.parametrize("size", [5, "4 GB"])
def test_a_wrong_total_size_is_said_and_ignored(folder: Path, size: object) -> None:
    with_total_size(folder, size)
    with pytest.warns(Int4Warning, match=f"total_size is {size!r}, its shards hold 4280 bytes; the shards count"):
        assert set(open_source(str(folder)).shards) == {ONE, TWO}


@pytest.mark.parametrize("size", [None, 4280, 4280.0])
def test_a_right_total_size_is_not_spoken_of(folder: Path, size: object) -> None:
    with_total_size(folder, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(str(folder)).nbytes == 4280
