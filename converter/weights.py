"""Where the weight files of a source are: in a folder, or on the Hub until each is needed."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from formats.container import Container, Header, parse_header
from formats.errors import CheckpointError
from formats.files import hash_file, link_roots, remove
from formats.hub import RemoteFile, cached, fetch, read_part
from formats.layout import TensorSpec
from formats.manifest import FileRecord
from formats.tensors import read_tensor, tensor_from

HEADER_GUESS = 1 << 16  # bytes of a remote file that are asked for first; most headers are no longer

FILES_STAGED = 2  # at most: one that is converted, and one that is fetched meanwhile


class Weights(Protocol):
    """The weight files of a source, by their names."""

    most: int | None  # files that may be on this machine at once

    def names(self) -> list[str]:
        """The files beside the index, weights or not."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def header(self, name: str) -> dict[str, TensorSpec]:
        """The tensors of a file, in the order of their bytes; raises `CheckpointError`."""

    def missing_bytes(self, name: str) -> int:
        """How much of a file is still to be fetched."""

    def staged_bytes(self, names: Iterable[str]) -> int:
        """How much of these files is at most held beside the output, of `most` at once."""

    def fetch(self, name: str) -> None:
        """Have a file on this machine; may take long."""

    def open(self, name: str) -> Container:
        """Open a file, fetched before or now."""

    def read(self, name: str, tensor: str) -> Tensor:
        """A tensor of a file that is not worked on, so that it need not be kept on this machine."""

    def check(self, file: FileRecord) -> None:
        """Raise `CheckpointError` if what was read as `file` is not what it is to be."""

    def same(self, file: FileRecord) -> bool:
        """Whether `file`, recorded by an earlier run, is still what it was."""

    def discard(self, name: str) -> None:
        """A file is not needed any more."""


class FolderWeights:
    """The files of a folder; links may lead to `roots`."""

    most: int | None = None

    def __init__(self, folder: Path, roots: tuple[Path, ...]) -> None:
        self.folder = folder
        self.roots = roots
        self._headers: dict[str, Header] = {}

    def names(self) -> list[str]:
        """See `Weights`."""
        return sorted(path.name for path in self.folder.iterdir())

    def has(self, name: str) -> bool:
        """See `Weights`."""
        return (self.folder / name).exists()

    def header(self, name: str) -> dict[str, TensorSpec]:
        """See `Weights`."""
        with self.open(name) as container:
            self._headers[name] = container.header
        return container.header.specs

    def missing_bytes(self, name: str) -> int:
        """See `Weights`."""
        return 0

    def staged_bytes(self, names: Iterable[str]) -> int:
        """See `Weights`."""
        return 0

    def fetch(self, name: str) -> None:
        """See `Weights`."""

    def open(self, name: str) -> Container:
        """See `Weights`."""
        return Container(self.folder / name, self.roots, self._headers.get(name))

    def read(self, name: str, tensor: str) -> Tensor:
        """See `Weights`."""
        with self.open(name) as container:
            return read_tensor(container, tensor)

    def check(self, file: FileRecord) -> None:
        """See `Weights`; a folder promises nothing."""

    def same(self, file: FileRecord) -> bool:
        """See `Weights`."""
        path = self.folder / file.name
        return path.is_file() and FileRecord(file.name, *hash_file(path, self.roots)) == file

    def discard(self, name: str) -> None:
        """See `Weights`; the folder is the user's."""


class HubWeights:
    """The files of a repository at one commit, in the Hub cache or, for as long as they are needed, in `staging`."""

    def __init__(
        self, repo_id: str, commit: str, files: dict[str, RemoteFile], staging: Path | None, *, quiet: bool
    ) -> None:
        self.repo_id = repo_id
        self.commit = commit
        self.files = files
        self.staging = staging
        self.most: int | None = None if staging is None else FILES_STAGED
        self.quiet = quiet
        self._headers: dict[str, Header] = {}

    def names(self) -> list[str]:
        """See `Weights`."""
        return sorted(name for name in self.files if "/" not in name)

    def has(self, name: str) -> bool:
        """See `Weights`."""
        return name in self.files

    def header(self, name: str) -> dict[str, TensorSpec]:
        """See `Weights`; by range requests unless the file is cached."""
        if not self.missing_bytes(name):
            with self.open(name) as container:
                self._headers[name] = container.header
        else:
            size = self.files[name].size
            self._headers[name] = parse_header(self._reader(name, size), size, f"{self.repo_id}: {name}")
        return self._headers[name].specs

    def missing_bytes(self, name: str) -> int:
        """See `Weights`."""
        return self.files[name].size if cached(self.repo_id, self.commit, name) is None else 0

    def staged_bytes(self, names: Iterable[str]) -> int:
        """See `Weights`."""
        return 0 if self.most is None else sum(sorted(self.files[name].size for name in names)[-self.most :])

    def fetch(self, name: str) -> None:
        """See `Weights`."""
        self._path(name)

    def open(self, name: str) -> Container:
        """See `Weights`."""
        path = self._path(name)
        return Container(path, link_roots(path.parents[name.count("/")]), self._headers.get(name))

    def read(self, name: str, tensor: str) -> Tensor:
        """See `Weights`: where weights are staged, by a range request, because a whole file would be one too many."""
        if self.staging is None or not self.missing_bytes(name):
            with self.open(name) as container:
                return read_tensor(container, tensor)
        entry = self._headers[name].tensors[tensor]
        return tensor_from(bytearray(self._part(name, entry.start, entry.end)), entry.spec)

    def check(self, file: FileRecord) -> None:
        """See `Weights`: the Hub knows the SHA-256 of large files, and its client compares sizes alone."""
        expected = self.files[file.name].sha256
        if expected is not None and file.sha256 != expected:
            path = self._path(file.name)
            raise CheckpointError(
                f"{self.repo_id}: {file.name} has the SHA-256 {file.sha256[:12]}…, the Hub says {expected[:12]}…; its "
                f"download was damaged: remove {path.resolve()} and run again"
            )

    def same(self, file: FileRecord) -> bool:
        """See `Weights`: a commit does not change."""
        return file.name in self.files and self.files[file.name].sha256 in (None, file.sha256)

    def discard(self, name: str) -> None:
        """See `Weights`: what was staged goes, the cache stays."""
        if self.staging is not None and (path := self.staging / name).exists():
            remove(path)

    def _path(self, name: str) -> Path:
        found = cached(self.repo_id, self.commit, name)
        return found or fetch(self.repo_id, self.commit, name, self.staging, quiet=self.quiet)

    def _reader(self, name: str, size: int) -> Callable[[int], bytes]:
        """What gives so many bytes from the beginning of a file, with few requests."""
        data = b""

        def read(count: int) -> bytes:
            nonlocal data
            if len(data) < count:
                data = self._part(name, 0, min(size, max(count, HEADER_GUESS)))
            return data[:count]

        return read

    def _part(self, name: str, start: int, end: int) -> bytes:
        data = read_part(self.repo_id, self.commit, name, start, end)
        if len(data) < end - start:
            raise CheckpointError(
                f"{self.repo_id}: {name} ends at byte {start + len(data)}, expected at least {end}; try again"
            )
        return data
