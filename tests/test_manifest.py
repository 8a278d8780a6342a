import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import convert_folder, write_checkpoint

from formats.errors import CheckpointError
from formats.layout import Scheme, TensorSpec
from formats.manifest import MANIFEST_NAME, Manifest, TensorRecord, features_of, read_manifest
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
    "vector as a matrix": (lambda m: m["tensors"][0].update(quantized=True, shape=[4]), "expected a matrix or a stack"),
    "empty matrix": (lambda m: m["tensors"][0].update(quantized=True, shape=[0, 4]), "expected a matrix or a stack"),
    "stack of stacks": (
        lambda m: m["tensors"][0].update(quantized=True, shape=[1] * 4),
        "expected a matrix or a stack",
    ),
    "stack that is not announced": (
        lambda m: m["tensors"][0].update(quantized=True, shape=[2, 3, 4]),
        "needs .'stacks'., which requires does not",
    ),
    "transposition that is not announced": (
        lambda m: m["tensors"][0].update(quantized=True, transposed=True),
        "needs .'transposed'., which requires does",
    ),
    "kept tensor that is transposed": (lambda m: m["tensors"][0].update(transposed=True), "is kept and transposed"),
    "unknown type": (lambda m: m["tensors"][0].update(dtype="F4"), "no file can hold"),
    "negative size": (lambda m: m["tensors"][0].update(shape=[-1]), "no file can hold"),
    "size over 64 bits": (lambda m: m["tensors"][0].update(shape=[1 << 62, 1 << 62]), "no file can hold"),
    "digest in capitals": (lambda m: m["files"][0].update(sha256="A" * 64), "SHA-256 in lower-case hex"),
    "digest of a tensor that is none": (lambda m: m["tensors"][0].update(sha256=["x"]), "SHA-256 in lower-case hex"),
    "digest of a source that is none": (lambda m: m["source"]["files"][0].update(sha256=""), "lower-case hex"),
    "too few digests": (lambda m: m["tensors"][0].update(sha256=[]), "0 digests"),
    "impossible group size": (lambda m: m["recipe"].update(group_size=7), "group size 7"),
}
UNSEALED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "changed field": (lambda m: m["source"].update(id="other"), "digest does not match"),
    "version of the future": (lambda m: m.update(format_version=2), "format version 2.*upgrade"),
    "version 0": (lambda m: m.update(format_version=0), "format_version is 0"),
    "version true": (lambda m: m.update(format_version=True), "format_version is True"),
    "unknown feature": (lambda m: m.update(requires=["int3"]), "needs .'int3'.*upgrade"),
    "feature that is no text": (lambda m: m.update(requires=[[]]), r"requires\[0\]: found \[\]"),
    "features of two kinds": (lambda m: m.update(requires=[1, "a"]), "needs .'a'"),
    "number too long to print": (lambda m: m["files"][0].update(size=10**4000), "expected a number of 64 bits"),
    "flag that is false": (
        lambda m: m["tensors"][0].update(transposed=False),
        r"tensors\[0\]\.transposed: found False, expected true, or no",
    ),
    "flag that is a number": (lambda m: m["tensors"][0].update(transposed=1), "transposed: found 1, expected true"),
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


def test_a_flag_stands_in_the_json_only_where_it_is_true(folder: Path) -> None:
    row = read_manifest(folder).tensors[0]
    turned = replace(row, transposed=True)
    assert to_json(row).keys() == to_json(turned).keys() - {"transposed"}
    assert to_json(turned)["transposed"] is True
    assert from_json(TensorRecord, to_json(turned), "test") == turned
    assert from_json(TensorRecord, to_json(row), "test") == row


def test_a_row_says_what_is_stored_for_a_transposed_stack(folder: Path) -> None:
    row = replace(read_manifest(folder).tensors[0], quantized=True, shape=(3, 24, 16), dtype="F32")
    assert row.matrix == TensorSpec("F32", (3, 24, 16))
    turned = replace(row, transposed=True)
    assert turned.matrix == TensorSpec("F32", (3, 16, 24))
    assert [spec.shape for spec in turned.stored(Scheme(8, False)).values()] == [(3, 16, 3), (3, 16, 3), (3, 2, 3)]
    assert features_of([row]) == ("stacks",)
    assert features_of([replace(row, quantized=False), turned]) == ("stacks", "transposed")


def test_an_infinite_error_is_refused(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(re.sub(r'"relative_mse": [0-9.e-]+', '"relative_mse": 1e999', path.read_text(), count=1))
    with pytest.raises(CheckpointError, match="relative_mse: found inf"):
        read_manifest(folder)


def test_another_text_of_the_same_json_is_refused(tmp_path: Path) -> None:
    convert_folder(write_checkpoint(tmp_path / "é"), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(rb"\u00e9", rb"\u00E9"))
    with pytest.raises(CheckpointError, match="digest does not match its text"):
        read_manifest(tmp_path / "out")


def test_a_manifest_over_the_limit_is_refused_before_it_is_parsed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("formats.files.MAX_SMALL", (folder / MANIFEST_NAME).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is over \d+ bytes"):
        read_manifest(folder)
