"""An int4 checkpoint as a whole: a folder whose manifest and shards must agree."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from formats.codec import check_scale
from formats.container import Container
from formats.errors import CheckpointError
from formats.files import hash_file, link_roots
from formats.layout import SCALE, TensorSpec
from formats.manifest import SHARD_METADATA, FileRecord, Manifest, read_manifest
from formats.tensors import tensor_from

READING_THREADS = 8  # one alone hashes more slowly than a disk reads
AHEAD_BYTES = 1 << 31  # of tensors that are read before they are asked for


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
        scheme, rows = self.manifest.recipe.scheme, self.manifest.tensors
        self._digests = {n: d for row in rows for n, d in zip(row.stored(scheme), row.sha256, strict=True)}
        self._scales = {row.name + SCALE for row in rows if row.quantized}
        for shard in self.manifest.shards:
            path, size = folder / shard, self.files[shard].size
            found = f"is {path.stat().st_size} bytes" if path.is_file() else "is missing"
            if found != f"is {size} bytes":
                raise CheckpointError(f"{path}: {found}, the manifest says {size} bytes; fetch the file again")

    def stream(self, verify: bool = True) -> Iterator[tuple[str, TensorSpec, bytearray]]:
        """Yield every stored tensor, shard by shard; with `verify` the SHA-256 of each is checked first.

        Several are read and hashed at once. Raises `CheckpointError` on a header that differs from the manifest, a
        wrong digest, a bad scale or a file that changes meanwhile.
        """
        reads: deque[tuple[str, TensorSpec, Future[bytearray]]] = deque()
        with ExitStack() as stack, ThreadPoolExecutor(READING_THREADS) as pool:
            for container, name in self._tensors(stack):
                spec = container.tensors[name].spec
                reads.append((name, spec, pool.submit(self._read, container, name, verify)))
                while sum(spec.nbytes for _, spec, _ in reads) > AHEAD_BYTES:
                    yield _first(reads)
            while reads:
                yield _first(reads)

    def verify(self) -> None:
        """Check every byte of every listed file; raises `CheckpointError` at the first that is wrong."""
        for _ in self.stream():
            pass
        with ThreadPoolExecutor(READING_THREADS) as pool:
            found = pool.map(lambda name: hash_file(self.folder / name, self._roots)[1], self.files)
            for name, digest in zip(self.files, found, strict=True):
                self._check_digest(name, digest)

    def _tensors(self, stack: ExitStack) -> Iterator[tuple[Container, str]]:
        """Every stored tensor with its file, which `stack` closes once all are read."""
        for shard, specs in self.manifest.shards.items():
            path = self.folder / shard
            container = stack.enter_context(Container(path, self._roots))
            _compare(specs, container, path)
            yield from ((container, name) for name in container.tensors)
            stack.callback(container.refuse_changed)

    def _read(self, container: Container, name: str, verify: bool) -> bytearray:
        data = container.read(name)
        if verify and (found := hashlib.sha256(data).hexdigest()) != self._digests[name]:
            raise CheckpointError(
                f"{container.path}: tensor {name!r} has the SHA-256 {found[:12]}…, the manifest says "
                f"{self._digests[name][:12]}…; the file is damaged: fetch it again"
            )
        if name in self._scales:
            _check_scale(name, container.tensors[name].spec, data, container.path)
        return data

    def _check_digest(self, name: str, found: str) -> None:
        expected = self.files[name].sha256
        if found != expected:
            raise CheckpointError(
                f"{self.folder / name}: SHA-256 is {found[:12]}…, the manifest says {expected[:12]}…; "
                "the file is damaged: fetch it again"
            )


def _first(reads: deque[tuple[str, TensorSpec, Future[bytearray]]]) -> tuple[str, TensorSpec, bytearray]:
    name, spec, data = reads.popleft()
    return name, spec, data.result()


def _compare(expected: dict[str, TensorSpec], container: Container, path: Path) -> None:
    found = {name: entry.spec for name, entry in container.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: tensor {name!r} is {found.get(name, 'missing')}, "
                f"the manifest says {expected.get(name, 'there is none')}; fetch the file again"
            )
    if container.metadata != SHARD_METADATA:
        raise CheckpointError(f"{path}: __metadata__ is {container.metadata!r:.200}, expected {SHARD_METADATA}")


def _check_scale(name: str, spec: TensorSpec, data: bytearray, path: Path) -> None:
    try:
        check_scale(tensor_from(data, spec))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from None
