"""Files that can be trusted: safe names, regular files only, atomic publication, a lock that dies with its holder."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from formats.errors import CheckpointError, OutputError, TemporaryError

PARTIAL_SUFFIX = ".partial"
READ_BLOCK = 1 << 20


def safe_name(name: str, where: str) -> str:
    """`name` if it is a plain relative path on every operating system, else `CheckpointError`."""
    parts = name.split("/")
    plain = (
        name.isprintable()
        and not name.startswith("~")
        and all(part not in ("", ".", "..") for part in parts)
        and not PureWindowsPath(name).drive
        and "\\" not in name
        and not PurePosixPath(name).is_absolute()
    )
    if not plain:
        raise CheckpointError(f"{where}: file name {name[:200]!r} could leave its folder; refusing to touch it")
    return name


def open_regular(path: Path, roots: Sequence[Path] = ()) -> int:
    """Open `path` for reading as a file descriptor; anything but a regular file (below one of `roots`) is refused."""
    if roots and not any(path.resolve().is_relative_to(root.resolve()) for root in roots):
        raise CheckpointError(f"{path}: is a link to {path.resolve()}, outside {roots[0]}; copy the file in its place")
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); is the checkpoint complete?") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: is not a regular file; expected a file with data")
    return fd


def read_small(path: Path, roots: Sequence[Path] = (), limit: int = 64 << 20) -> bytes:
    """The bytes of a regular file of at most `limit` bytes."""
    with open(open_regular(path, roots), "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise CheckpointError(f"{path}: is over {limit} bytes, more than any file of its kind needs")
    return raw


def read_blocks(path: Path, roots: Sequence[Path] = ()) -> Iterator[bytes]:
    """The bytes of a regular file of any size, block by block."""
    with open(open_regular(path, roots), "rb") as file:
        while block := file.read(READ_BLOCK):
            yield block


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _output_error(path: Path, error: OSError) -> OutputError:
    advice = "free some space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
    return OutputError(f"{path}: cannot be written ({error.strerror}); {advice}")


@contextmanager
def publish(path: Path) -> Iterator[int]:
    """Yield a descriptor of a new file that takes the name `path` only once it is whole and on disk.

    Raises `OutputError` where the file system refuses; then, as after any other error, `path` is as it was.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        # Mode 0666: the user's umask decides, as for any file that a program writes.
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _output_error(path, error) from None
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _output_error(path, error) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def publish_bytes(path: Path, data: bytes) -> None:
    """Write a whole small file atomically."""
    with publish(path) as fd:
        write_all(fd, data)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` as a lock file; the file holds the process id, and is gone afterwards.

    Raises `TemporaryError` naming the holder when another process holds it. The lock saves work and confusion;
    correctness does not rest on it, because every file is published whole.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _output_error(path, error) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise TemporaryError(f"{path.parent}: in use by process {holder}; wait for it, or stop it") from None
        if os.fstat(fd).st_nlink:  # else its last holder removed the file between our open and our lock
            break
        os.close(fd)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)
