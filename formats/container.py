"""The safetensors container, read strictly with pread and written as a stream.

A mapped file that is cut short kills the process that reads it, so nothing is mapped here.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from formats.errors import CheckpointError
from formats.files import READ_BLOCK, NewFile, open_regular, reading
from formats.lane import Lane
from formats.layout import DTYPE_BYTES, MAX_SIZE, TensorSpec
from formats.strict_json import parse_object

SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_NAME_BYTES = 512
DATA_ALIGNMENT = 64

_NOT_SAFETENSORS = {
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    b"<!DOCTYPE": "a web page; download it again",
    b"<html": "a web page; download it again",
    b"PK\x03\x04": "a zip or pickle file; convert the model to safetensors first",
    b"\x80": "a pickle file; convert the model to safetensors first",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what it is, and its bytes as absolute offsets [start, end)."""

    spec: TensorSpec
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its first bytes, its entries in the order of their bytes, its metadata."""

    raw: bytes
    tensors: dict[str, Entry]
    metadata: dict[str, str]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Type and shape of every tensor, in the order of their bytes."""
        return {name: entry.spec for name, entry in self.tensors.items()}

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return max((entry.end for entry in self.tensors.values()), default=len(self.raw))


class Container:
    """A safetensors file opened for reading; raises `CheckpointError` where `parse_header` does.

    A header that is `known`, from the file having been open before, is not parsed again if the file still has it: with
    many thousand tensors that takes a second.
    """

    def __init__(self, path: Path, roots: Sequence[Path] = (), known: Header | None = None) -> None:
        self.path = path
        self._fd = open_regular(path, roots)
        try:
            with reading(path):
                self._opened = os.fstat(self._fd)
            self.size = self._opened.st_size
            self.header = known if known is not None and self._has(known) else self._parsed()
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor by its name, in the order of their bytes."""
        return self.header.tensors

    @property
    def metadata(self) -> dict[str, str]:
        """The free text of the header."""
        return self.header.metadata

    def __enter__(self) -> "Container":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes of the file from `start` on."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot be read at byte {start + done} ({error.strerror})"
                ) from None
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {start + done}, expected at least {start + len(view)}; "
                    "the file was cut short"
                )
            done += count

    def chunks(
        self, spans: Sequence[tuple[int, int]], buffers: Sequence[memoryview], digest: "hashlib._Hash"
    ) -> Iterator[memoryview]:
        """Yield the bytes of each of `spans`, which cover the data of the file in order.

        `digest` is fed the whole file. Reading and hashing go on in threads, ahead in `buffers`: three or more, of the
        size of the largest span. What is yielded holds until the next. Raises `CheckpointError` if the file changed
        since it was opened.
        """
        digest.update(self.header.raw)
        ahead, reads, hashes = len(buffers) // 2, deque[Future[memoryview]](), deque[Future[None]]()
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as hasher:
            for i in range(len(spans) + ahead):
                if len(hashes) + ahead >= len(buffers):  # of the buffer that is to be filled
                    hashes.popleft().result()
                if i < len(spans):
                    reads.append(reader.submit(self._fill, spans[i], buffers[i % len(buffers)]))
                if i >= ahead:
                    chunk = reads.popleft().result()
                    hashes.append(hasher.submit(digest.update, chunk))
                    yield chunk
        self.refuse_changed()

    def _fill(self, span: tuple[int, int], buffer: memoryview) -> memoryview:
        """The bytes of `span`, in the beginning of `buffer`."""
        start, end = span
        view = buffer[: end - start]
        self.read_into(view, start)
        return view

    def _has(self, header: Header) -> bool:
        return header.file_size == self.size and self._beginning(len(header.raw)) == header.raw

    def _parsed(self) -> Header:
        return parse_header(self._beginning, self.size, str(self.path))

    def _beginning(self, size: int) -> bytearray:
        data = bytearray(size)
        self.read_into(memoryview(data), 0)
        return data

    def refuse_changed(self) -> None:
        """Raise `CheckpointError` if the file is not what it was when it was opened."""
        with reading(self.path):
            now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self.size, self._opened.st_mtime_ns):
            raise CheckpointError(f"{self.path}: changed while it was read; wait until it is complete and run again")


def parse_header(read: Callable[[int], bytes | bytearray], size: int, where: str) -> Header:
    """The header of a file of `size` bytes, of which `read` gives so many from the beginning.

    Raises `CheckpointError` unless the tensors cover the file exactly, without holes, overlaps or trailing bytes.
    """
    length = int.from_bytes(read(min(8, size)), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{where}: is not a whole safetensors file: {_describe(read(min(32, size)), size, length)}"
        )
    raw = bytes(read(8 + length))
    if raw[8:9] != b"{":
        raise CheckpointError(f"{where}: header does not begin with '{{'; fetch the file again")
    fields = parse_object(raw[8:], f"{where}: header")
    metadata = _parse_metadata(fields.pop("__metadata__", {}), where)
    entries = {name: _parse_entry(name, entry, 8 + length, where) for name, entry in fields.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, entry in ordered.items():
        if entry.start != position:
            raise CheckpointError(
                f"{where}: tensor {name!r} begins at byte {entry.start}, expected {position}: "
                "the header leaves a hole or an overlap; fetch the file again"
            )
        position = entry.end
    if position != size:
        raise CheckpointError(f"{where}: is {size} bytes, its header describes {position}; fetch the file again")
    return Header(raw, ordered, metadata)


def _describe(start: bytes | bytearray, size: int, length: int) -> str:
    for magic, what in _NOT_SAFETENSORS.items():
        if start.startswith(magic):
            return f"it is {what}"
    return f"{size} bytes, header of {length} bytes announced; the download is incomplete or the file damaged"


def _parse_metadata(raw: Any, where: str) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise CheckpointError(f"{where}: header field __metadata__ is not a map of strings; fetch the file again")
    return raw


def _parse_entry(name: str, raw: Any, data_start: int, file: str) -> Entry:
    where = f"{file}: tensor {name[:200]!r}"
    if not name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
        raise CheckpointError(f"{where}: expected a printable name of 1 to {MAX_NAME_BYTES} bytes")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: header entry needs exactly dtype, shape and data_offsets; fetch it again")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: type {dtype!r:.80} is not supported; expected one of {', '.join(DTYPE_BYTES)}")
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        # `type(v) is int`: a JSON true would pass as an int.
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v <= MAX_SIZE for v in value):
            raise CheckpointError(
                f"{where}: {field} is {value!r:.80}, expected whole numbers from 0 to 2^63 − 1; fetch it again"
            )
    spec = TensorSpec(dtype, tuple(shape))
    if not spec.is_possible:
        raise CheckpointError(f"{where}: shape is {shape!r:.80}, which no file can hold; fetch it again")
    if len(offsets) != 2 or offsets[1] - offsets[0] != spec.nbytes:
        raise CheckpointError(
            f"{where}: data_offsets {offsets!r:.80}, but {spec} takes {spec.nbytes} bytes; fetch it again"
        )
    return Entry(spec, data_start + offsets[0], data_start + offsets[1])


def file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The order of tensors in a file: as given, but sizes that are no multiple of 8 last, widest type first.

    So every tensor starts at a multiple of its element size, which readers that map files rely on.
    """

    def key(name: str) -> int:
        spec = specs[name]
        return -DTYPE_BYTES[spec.dtype] if spec.nbytes % 8 else -9

    return sorted(specs, key=key)


def build_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The header, length field included, of a file that holds `specs` in `file_order`.

    Raises `CheckpointError` where it is larger than any reader takes.
    """
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in file_order(specs):
        spec = specs[name]
        end = position + spec.nbytes
        fields[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{len(specs)} tensors need a header of {len(text)} bytes, {MAX_HEADER_BYTES} are the most that a file may "
            "have; save the model in more and smaller files"
        )
    return len(text).to_bytes(8, "little") + text


class Writer:
    """Writes tensors into a new file in the places of `file_order`, piece by piece, and hashes the file meanwhile.

    Use as a context: one thread writes and one hashes, and a piece is not to change once it is given. What comes in the
    order of the file is hashed as it comes; the rest is read again at the end.
    """

    def __init__(self, file: NewFile, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self._header = build_header(specs, metadata)
        self._file = file
        self._writing, self._hashing = Lane(), Lane()
        self._lanes = ExitStack()
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._size = len(self._header)
        self._left: dict[str, tuple[int, int]] = {}  # where the next piece of a tensor belongs, and where it ends
        for name in file_order(specs):
            end = self._size + specs[name].nbytes
            self._left[name] = self._size, end
            self._size = end

    def __enter__(self) -> "Writer":
        with ExitStack() as lanes:
            lanes.enter_context(self._hashing)  # left last: whatever writing raises, no thread stays
            lanes.enter_context(self._writing)
            self._write(self._header, 0)
            self._lanes = lanes.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lanes.__exit__(kind, error, trace)

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Write the next bytes of the tensor `name`; raises `ValueError` when they are more than was announced.

        An error of writing may be raised by a later call.
        """
        position, end = self._left[name]
        if position + len(data) > end:
            raise ValueError(f"{name}: got {position + len(data) - end} bytes too many")
        self._write(data, position)
        self._left[name] = position + len(data), end

    def finish(self) -> tuple[int, str]:
        """Size and SHA-256 of the whole file; raises `ValueError` while bytes of a tensor are missing."""
        for name, (position, end) in self._left.items():
            if position != end:
                raise ValueError(f"{name}: {end - position} bytes were never written")
        self._writing.drain()
        self._hashing.drain()
        while self._hashed < self._size:
            data = self._file.read(min(READ_BLOCK, self._size - self._hashed), self._hashed)
            self._digest.update(data)
            self._hashed += len(data)
        return self._size, self._digest.hexdigest()

    def _write(self, data: bytes | bytearray | memoryview, position: int) -> None:
        self._writing.put(self._file.write, data, position)
        if position == self._hashed:
            self._hashing.put(self._digest.update, data)
            self._hashed += len(data)
