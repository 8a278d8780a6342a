"""Files that can be trusted: safe names, regular files only, atomic publication, a lock that dies with its holder."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from formats.errors import CheckpointError, OutputError, TemporaryError, UsageError

PARTIAL_SUFFIX = ".partial"
PARTIAL = re.compile(rf"\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}$")  # what `publish` puts behind a name
READ_BLOCK = 1 << 20
MAX_NAME_BYTES, MAX_PATH = 255, 1024  # what file systems take of a name, and leave room for of a path below a folder
MAX_NEW_BYTES = MAX_NAME_BYTES - len(".01234567.partial")  # of a name to `publish` under
MAX_SMALL = 256 << 20  # bytes of a file that is read whole; the manifest of 100,000 experts takes a quarter of it
SHARED_BLOBS = "blobs"  # beside the repositories of a Hub cache, for files that came through Xet
LOCK_CONTENT = re.compile(rb"\d{0,20}\n?")


def safe_name(name: str, where: str) -> str:
    """`name` if it is a plain relative path on every operating system, else `CheckpointError`."""
    if not name.isprintable():
        raise CheckpointError(f"{where}: file name {name[:200]!r} is not printable UTF-8; rename the file")
    parts = name.split("/")
    if len(name) > MAX_PATH or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise CheckpointError(f"{where}: file name {name[:200]!r}… is too long; shorten it")
    plain = (
        all(part not in ("", ".", "..") for part in parts)
        and not (name.startswith("~") and len(parts) > 1)  # a shell would take it for somebody's home
        and not PureWindowsPath(name).drive
        and "\\" not in name
        and not PurePosixPath(name).is_absolute()
    )
    if not plain:
        raise CheckpointError(f"{where}: file name {name[:200]!r} could leave its folder; refusing to touch it")
    return name


def local_folder(model: str) -> Path | None:
    """The folder `model`, or None where that may be a Hub id; raises `UsageError` for a file."""
    if os.path.isdir(model):  # of any text: Path.is_dir raises on one that is too long for a name
        return Path(model)
    if os.path.isfile(model):
        raise UsageError(f"{model}: is a file; give the folder that holds it")
    return None


def link_roots(folder: Path) -> tuple[Path, ...]:
    """The folders that links in `folder` may lead to: itself, or in a Hub snapshot all that its cache shares."""
    folder = real_path(folder)
    for snapshots in folder.parents:  # not only the next: a model may be in a subfolder of its repository
        repository = snapshots.parent
        if snapshots.name == "snapshots" and "--" in repository.name:
            shared = repository.parent / SHARED_BLOBS
            return (repository,) if shared.is_symlink() else (repository, shared)
    return (folder,)


def open_regular(path: Path, roots: Sequence[Path] = ()) -> int:
    """Open `path` for reading as a file descriptor; anything but a regular file (below one of `roots`) is refused."""
    target = real_path(path)
    if roots and not any(target.is_relative_to(real_path(root)) for root in roots):
        raise CheckpointError(f"{path}: is a link to {target}, outside {roots[0]}; copy the file in its place")
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise TemporaryError(f"{path}: cannot be opened ({error.strerror}); raise `ulimit -n`, run again") from None
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); is the checkpoint complete?") from None
    try:
        with reading(path):
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if not regular:
            raise CheckpointError(f"{path}: is not a regular file; expected a file with data")
    except BaseException:
        os.close(fd)
        raise
    return fd


def real_path(path: Path) -> Path:
    """`path` without links; where they go round in a circle, which `Path.resolve` raises on, opening it will tell."""
    return Path(os.path.realpath(path))


def read_small(path: Path, roots: Sequence[Path] = ()) -> bytes:
    """The bytes of a regular file of at most `MAX_SMALL` bytes."""
    with open(open_regular(path, roots), "rb") as file, reading(path):
        raw = file.read(MAX_SMALL + 1)
    if len(raw) > MAX_SMALL:
        raise CheckpointError(f"{path}: is over {MAX_SMALL} bytes, more than any file of its kind needs")
    return raw


def read_blocks(path: Path, roots: Sequence[Path] = ()) -> Iterator[bytes]:
    """The bytes of a regular file of any size, block by block."""
    with open(open_regular(path, roots), "rb") as file, reading(path):
        while block := file.read(READ_BLOCK):
            yield block


def hash_file(path: Path, roots: Sequence[Path] = ()) -> tuple[int, str]:
    """Size and SHA-256 of a regular file."""
    digest, size = hashlib.sha256(), 0
    for block in read_blocks(path, roots):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, what the operating system refuses is a `CheckpointError` about `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the disk, or fetch it again") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "free some space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
        raise OutputError(f"{path}: cannot be written ({error.strerror}); {advice}") from None


@dataclass(frozen=True)
class NewFile:
    """A file on its way to the name `path`."""

    path: Path
    fd: int

    def write(self, data: bytes | bytearray | memoryview, position: int) -> None:
        """Write every byte of `data` at `position`, or raise `OutputError`."""
        view = memoryview(data)
        with _writing(self.path):
            while view:
                count = os.pwrite(self.fd, view, position)
                view, position = view[count:], position + count

    def copy(self, source: Path, roots: Sequence[Path] = ()) -> tuple[int, str]:
        """Write every byte of the regular file `source`; returns their number and their SHA-256."""
        digest, size = hashlib.sha256(), 0
        for block in read_blocks(source, roots):
            self.write(block, size)
            digest.update(block)
            size += len(block)
        return size, digest.hexdigest()

    def read(self, size: int, position: int) -> bytes:
        """At most `size` of the bytes written from `position` on; raises `OutputError` where there are none."""
        with _writing(self.path):
            if not (data := os.pread(self.fd, size, position)):
                raise OSError(errno.EIO, "what was written is not there")
            return data


@contextmanager
def publish(path: Path) -> Iterator[NewFile]:
    """Yield a new file that takes the name `path` only once it is whole and on disk.

    Raises `OutputError` where the file system refuses; then, as after any other error, `path` is as it was.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        with _writing(path):  # in here, because a signal can come as soon as the file is there
            # Mode 0666: the user's umask decides, as for any file that a program writes.
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield NewFile(path, fd)
            with _writing(path):
                os.fsync(fd)
        finally:
            os.close(fd)
        rename(partial, path)
    except BaseException:
        with suppress(OSError):  # the error that brought us here says more
            partial.unlink(missing_ok=True)
        raise


def rename(old: Path, new: Path) -> None:
    """Give `old` the name `new` in the same folder, in one step and for good; raises `OutputError`."""
    with _writing(new):
        os.replace(old, new)
        folder = os.open(new.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path: Path) -> None:
    """Make a folder and its parents if they are missing; raises `OutputError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made a folder ({error.strerror}); choose another") from None


def leaves(folder: Path) -> list[Path]:
    """Every file, link and empty folder below `folder`; raises `OutputError` where it cannot be listed."""
    with _writing(folder):
        found = sorted(folder.iterdir())
    inner = {path: leaves(path) if path.is_dir() and not path.is_symlink() else [] for path in found}
    return [leaf for path in found for leaf in inner[path] or [path]]


def remove(path: Path) -> None:
    """Remove a file or an empty folder; raises `OutputError`."""
    with _writing(path):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def remove_below(folder: Path, path: Path) -> None:
    """Remove `path`, and the folders between it and `folder` that it leaves empty; raises `OutputError`."""
    remove(path)
    for parent in path.relative_to(folder).parents[:-1]:
        if not leaves(folder / parent):
            remove(folder / parent)


def whole_name(name: str) -> str:
    """The name that a file takes once it is whole."""
    return PARTIAL.sub("", name)


def clear_folder(folder: Path, ours: re.Pattern[str], keep: Collection[str] = ()) -> None:
    """Remove files whose names are `ours`, whole or half-made, but those to `keep`, and the folder if it is empty."""
    if folder.is_dir():
        for path in leaves(folder):
            if ours.fullmatch(whole_name(path.name)) and path.name not in keep:
                remove(path)
        if not leaves(folder):
            remove(folder)


def publish_bytes(path: Path, data: bytes) -> None:
    """Write a whole small file atomically."""
    with publish(path) as file:
        file.write(data, 0)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` as a lock file; the file holds the process id, and is gone afterwards.

    Raises `TemporaryError` naming the holder when another process holds it, `OutputError` for anything that is no lock
    file or cannot be one. The lock saves work and confusion; correctness does not rest on it, because every file is
    published whole.
    """
    fd = _open_locked(path)
    try:
        with _writing(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        try:
            with suppress(OSError):  # a file that stays is no obstacle
                path.unlink(missing_ok=True)
        finally:
            os.close(fd)


def _open_locked(path: Path) -> int:
    while True:
        with _writing(path):  # O_NOFOLLOW: a link could lead to a file that we would empty
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with _writing(path):
                _take(fd, path)
                linked = os.fstat(fd).st_nlink
            if linked:  # else its last holder removed the file between our open and our lock
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _take(fd: int, path: Path) -> None:
    content = os.pread(fd, 64, 0)
    if not LOCK_CONTENT.fullmatch(content):
        raise OutputError(f"{path}: is no lock file of ours; remove it, or choose a new folder")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = content.decode().strip() or "unknown"
        raise TemporaryError(f"{path.parent}: in use by process {holder}; wait for it, or stop it") from None
