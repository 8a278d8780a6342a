"""An int4 checkpoint as a whole: a folder whose manifest and shards must agree."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from formats.codec import check_scale
from formats.container import Container, build_header
from formats.errors import CheckpointError
from formats.files import hash_file, link_roots
from formats.layout import SCALE, TensorSpec
from formats.manifest import CARD_NAME, SHARD_METADATA, FileRecord, Manifest, read_manifest
from formats.tensors import read_tensor

READING_THREADS = 8  # one alone hashes more slowly than a disk reads
HASHED_BYTES = 4 << 20  # of a file at a time, to verify it
AHEAD_BYTES = 1 << 31  # of tensors that are read before they are asked for


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint that is open: its type and shape, and what reads it."""

    spec: TensorSpec
    read: Callable[[], Tensor]


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

    def stream(
        self, verify: bool = True, device: torch.device | None = None
    ) -> Iterator[tuple[str, TensorSpec, Tensor]]:
        """Yield every stored tensor, the largest first, on `device` (or the CPU); with `verify` its SHA-256 is checked.

        Several are read and hashed at once. Raises `CheckpointError` as `opened` does.
        """
        reads: deque[tuple[str, TensorSpec, Future[Tensor]]] = deque()
        ahead = 0  # bytes of all that is in `reads`
        with self.opened(verify, device) as stored, ThreadPoolExecutor(READING_THREADS) as pool:
            try:
                for name, (spec, read) in sorted(stored.items(), key=lambda item: -item[1].spec.nbytes):
                    reads.append((name, spec, pool.submit(read)))
                    ahead += spec.nbytes
                    while ahead > AHEAD_BYTES:
                        ahead -= reads[0][1].nbytes
                        yield _first(reads)
                while reads:
                    yield _first(reads)
            finally:  # after an error, or when nobody wants the rest, what has not begun is not read
                pool.shutdown(cancel_futures=True)

    @contextmanager
    def opened(self, verify: bool = True, device: torch.device | None = None) -> Iterator[dict[str, StoredTensor]]:
        """Every stored tensor by its name, to be read onto `device` (or the CPU), by any thread, as long as this lasts.

        Raises `CheckpointError` on a header that differs from the manifest, with `verify` in any byte. Reading does
        with `verify` on a wrong SHA-256, and on a bad scale; the end on a file that has changed meanwhile.
        """
        with ExitStack() as stack:
            yield {
                name: StoredTensor(entry.spec, partial(self._read, container, name, verify, device))
                for container in self._containers(stack, verify)
                for name, entry in container.tensors.items()
            }

    def verify(self) -> int:
        """Check every byte of every listed file but the card, read once, and return how many these are.

        Raises `CheckpointError` at the first that is wrong.
        """
        names = [name for name in self.files if name != CARD_NAME]
        with ExitStack() as stack, ThreadPoolExecutor(READING_THREADS) as pool:
            shards = {container.path.name: container for container in self._containers(stack)}  # all bytes come below

            def digest_of(name: str) -> str:
                return (
                    self._hash_shard(shards[name]) if name in shards else hash_file(self.folder / name, self._roots)[1]
                )

            for name, digest in zip(names, pool.map(digest_of, names), strict=True):
                self._check_file(name, digest)
        return len(names)

    def _hash_shard(self, container: Container) -> str:
        """The SHA-256 of a shard, whose tensors are checked on the way."""
        whole, digests = hashlib.sha256(), {name: hashlib.sha256() for name in container.tensors}
        pieces = [
            (name, (start, min(start + HASHED_BYTES, entry.end)))
            for name, entry in container.tensors.items()
            for start in range(entry.start, entry.end, HASHED_BYTES)
        ]
        size = max((end - start for _, (start, end) in pieces), default=0)
        buffers = [memoryview(bytearray(size)) for _ in range(4)]
        chunks = container.chunks([span for _, span in pieces], buffers, whole)
        for (name, _), chunk in zip(pieces, chunks, strict=True):
            digests[name].update(chunk)
        for name, digest in digests.items():
            self._check_tensor(container, name, digest)
        for name in self._scales & digests.keys():
            _check_scale(container, name, read_tensor(container, name))
        return whole.hexdigest()

    def _containers(self, stack: ExitStack, verify: bool = False) -> Iterator[Container]:
        """Every shard, opened until `stack` ends, which sees that none has changed meanwhile.

        With `verify` every byte of its header is checked, not only what it says.
        """
        for shard, specs in self.manifest.shards.items():
            path = self.folder / shard
            container = stack.enter_context(Container(path, self._roots))
            stack.callback(container.refuse_changed)
            _compare(specs, container, path)
            # The format leaves it to the writer how the text of a header is spelt, and the manifest has no digest of it
            # alone: one that our converter would not write is either another program's or damaged.
            if verify and container.header.raw != build_header(specs, SHARD_METADATA):
                self._check_file(shard, hash_file(path, self._roots)[1])
            yield container

    def _read(self, container: Container, name: str, verify: bool, device: torch.device | None) -> Tensor:
        digest = hashlib.sha256() if verify else None
        tensor = read_tensor(container, name, device, digest)
        if digest is not None:
            self._check_tensor(container, name, digest)
        if name in self._scales:
            _check_scale(container, name, tensor)
        return tensor

    def _check_tensor(self, container: Container, name: str, digest: "hashlib._Hash") -> None:
        if (found := digest.hexdigest()) != self._digests[name]:
            raise CheckpointError(
                f"{container.path}: tensor {name!r} has the SHA-256 {found[:12]}…, the manifest says "
                f"{self._digests[name][:12]}…; the file is damaged: fetch it again"
            )

    def _check_file(self, name: str, found: str) -> None:
        expected = self.files[name].sha256
        if found != expected:
            raise CheckpointError(
                f"{self.folder / name}: SHA-256 is {found[:12]}…, the manifest says {expected[:12]}…; "
                "the file is damaged: fetch it again"
            )


def _first(reads: deque[tuple[str, TensorSpec, Future[Tensor]]]) -> tuple[str, TensorSpec, Tensor]:
    name, spec, tensor = reads.popleft()
    return name, spec, tensor.result()


def _check_scale(container: Container, name: str, scale: Tensor) -> None:
    try:
        check_scale(scale)
    except CheckpointError as error:
        raise CheckpointError(f"{container.path}: {name}: {error}") from None


def _compare(expected: dict[str, TensorSpec], container: Container, path: Path) -> None:
    found = container.header.specs
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: tensor {name!r} is {found.get(name, 'missing')}, "
                f"the manifest says {expected.get(name, 'there is none')}; fetch the file again"
            )
    if container.metadata != SHARD_METADATA:
        raise CheckpointError(f"{path}: __metadata__ is {container.metadata!r:.200}, expected {SHARD_METADATA}")
