"""An int4 checkpoint as a whole: a folder whose manifest and shards must agree."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from formats.codec import check_scale
from formats.container import Container
from formats.errors import CheckpointError
from formats.files import hash_file, link_roots
from formats.layout import SCALE, TensorSpec
from formats.manifest import FileRecord, Manifest, read_manifest
from formats.tensors import tensor_from


class Checkpoint:
    """A finished int4 checkpoint folder.

    Raises `CheckpointError` when the manifest is missing or wrong, or a shard is missing or of another size. Side files
    are left to `verify`: people edit them, and the weights are none the worse for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._roots = link_roots(folder)  # no file outside them is opened, whatever a link says
        self.manifest: Manifest = read_manifest(folder)
        self.files: dict[str, FileRecord] = {file.name: file for file in self.manifest.files}
        for shard in self.manifest.shards:
            path, size = folder / shard, self.files[shard].size
            found = f"is {path.stat().st_size} bytes" if path.is_file() else "is missing"
            if found != f"is {size} bytes":
                raise CheckpointError(f"{path}: {found}, the manifest says {size} bytes; fetch the file again")

    def stream(self, verify: bool = True) -> Iterator[tuple[str, TensorSpec, bytearray]]:
        """Yield every stored tensor, shard by shard; with `verify` a shard's SHA-256 is checked at its end.

        Raises `CheckpointError` on a header that differs from the manifest, a wrong digest or a bad scale.
        """
        scales = {row.name + SCALE for row in self.manifest.tensors if row.quantized}
        for shard, specs in self.manifest.shards.items():
            path = self.folder / shard
            digest = hashlib.sha256() if verify else None
            with Container(path, self._roots) as container:
                _compare(specs, {name: entry.spec for name, entry in container.tensors.items()}, path)
                for name, spec, data in container.stream(digest):
                    if name in scales:
                        _check_scale(name, spec, data, path)
                    yield name, spec, data
            if digest is not None:
                self._check_digest(shard, digest.hexdigest())

    def verify(self) -> None:
        """Check every byte of every listed file; raises `CheckpointError` at the first that is wrong."""
        expected = {
            name: digest
            for row in self.manifest.tensors
            for name, digest in zip(row.stored(self.manifest.recipe.scheme), row.sha256, strict=True)
        }
        for name, _, data in self.stream():
            if hashlib.sha256(data).hexdigest() != expected[name]:
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} has another SHA-256 than its row; fetch it again"
                )
        for name in self.files.keys() - self.manifest.shards.keys():
            self._check_digest(name, hash_file(self.folder / name, self._roots)[1])

    def _check_digest(self, name: str, found: str) -> None:
        expected = self.files[name].sha256
        if found != expected:
            raise CheckpointError(
                f"{self.folder / name}: SHA-256 is {found[:12]}…, the manifest says {expected[:12]}…; "
                "the file is damaged: fetch it again"
            )


def _compare(expected: dict[str, TensorSpec], found: dict[str, TensorSpec], path: Path) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: tensor {name!r} is {found.get(name, 'missing')}, "
                f"the manifest says {expected.get(name, 'there is none')}; fetch the file again"
            )


def _check_scale(name: str, spec: TensorSpec, data: bytearray, path: Path) -> None:
    try:
        check_scale(tensor_from(data, spec))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from None
