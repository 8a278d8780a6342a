import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import convert_folder, write_checkpoint

from formats.errors import CheckpointError
from formats.manifest import MANIFEST_NAME, Manifest, read_manifest
from formats.records import from_json, to_json
from formats.strict_json import canonical


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert_folder(write_checkpoint(tmp_path / "source"), tmp_path / "out")
    return tmp_path / "out"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], seal: bool = True) -> None:
    path = folder / MANIFEST_NAME
    fields = json.loads(path.read_text())
    change(fields)
    if seal:
        manifest = from_json(Manifest, fields, "test").sealed()
        fields = to_json(manifest)
    path.write_bytes(canonical(fields))


def test_json_round_trip_keeps_every_field(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert from_json(Manifest, to_json(manifest), "test") == manifest
    assert manifest.to_bytes() == (folder / MANIFEST_NAME).read_bytes()


def test_a_folder_without_manifest_did_not_finish(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did not finish"):
        read_manifest(tmp_path)


SEALED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "file outside the folder": (lambda m: m["files"][0].update(name="../x"), "could leave its folder"),
    "file listed twice": (lambda m: m["files"].append(m["files"][0]), "lists a file twice"),
    "shard that is not listed": (lambda m: m["tensors"][0].update(file="x.i4.safetensors"), "no shard"),
    "weights in a side file": (lambda m: m["tensors"][0].update(file="config.json"), "no shard"),
    "tensor listed twice": (lambda m: m["tensors"].append(m["tensors"][0]), "stored twice"),
    "vector as a matrix": (lambda m: m["tensors"][0].update(quantized=True, shape=[4]), "expected a matrix"),
    "empty matrix": (lambda m: m["tensors"][0].update(quantized=True, shape=[0, 4]), "expected a matrix"),
    "unknown type": (lambda m: m["tensors"][0].update(dtype="F4"), "no file can hold"),
    "negative size": (lambda m: m["tensors"][0].update(shape=[-1]), "no file can hold"),
    "too few digests": (lambda m: m["tensors"][0].update(sha256=[]), "0 digests"),
    "impossible group size": (lambda m: m["recipe"].update(group_size=7), "group size 7"),
}
UNSEALED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "changed field": (lambda m: m["source"].update(id="other"), "digest does not match"),
    "version of the future": (lambda m: m.update(format_version=2), "format version 2.*upgrade"),
    "version 0": (lambda m: m.update(format_version=0), "format_version is 0"),
    "version true": (lambda m: m.update(format_version=True), "format_version is True"),
    "unknown feature": (lambda m: m.update(requires=["int3"]), "needs .'int3'.*upgrade"),
    "unknown field": (lambda m: m.update(extra=1), "unknown .'extra'"),
    "missing field": (lambda m: m.pop("files"), "missing .'files'"),
    "true for a number": (lambda m: m["recipe"].update(group_size=True), "recipe.group_size: found True"),
    "number for a text": (lambda m: m["source"].update(id=3), "source.id: found 3"),
    "text for an array": (lambda m: m.update(files="x"), "files: found 'x'"),
    "null for a record": (lambda m: m.update(recipe=None), "recipe: found None"),
}


@pytest.mark.parametrize("kind", SEALED)
def test_a_manifest_that_contradicts_itself_is_refused(kind: str, folder: Path) -> None:
    change, message = SEALED[kind]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("kind", UNSEALED)
def test_a_manifest_that_is_not_ours_is_refused(kind: str, folder: Path) -> None:
    change, message = UNSEALED[kind]
    rewrite(folder, change, seal=False)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def test_the_digest_covers_every_field(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert replace(manifest, requires=("x",)).sealed().digest != manifest.digest
