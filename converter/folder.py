"""A folder to write into: apart from its source, locked, with room on its disk, and with nobody else's files."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.errors import OutputError, some
from formats.files import leaves, lock, make_folder, real_path, remove_below, whole_name

HIDDEN = ".int4-convert"  # what the names begin with of files and folders that are gone once all is done
LOCK_NAME = f"{HIDDEN}.lock"
JOURNAL_NAME = f"{HIDDEN}.json"
SPARE_BYTES = 64 << 20  # for index, journal and manifest


@contextmanager
def new_folder(folder: Path, source: Path, needed: int) -> Iterator[None]:
    """Hold `folder`, new or empty but for hidden files, locked; what was written into it goes if an error comes.

    Raises `OutputError` for a folder that holds something, lies in the `source` or has not the bytes `needed`,
    `TemporaryError` when another run holds it.
    """
    refuse_overlap(folder, source)
    make_folder(folder)
    with lock(folder / LOCK_NAME):
        if found := _visible(folder):
            raise OutputError(f"{folder}: holds {some(sorted(found))}; choose an empty or new folder")
        refuse_full_disk(folder, needed)
        try:
            yield
        except BaseException:
            for path in _visible(folder).values():
                remove_below(folder, path)
            raise


def _visible(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in leaves(folder)}
    return {name: path for name, path in found.items() if not is_apart(name) and name != LOCK_NAME}


def refuse_overlap(folder: Path, source: Path) -> None:
    """Raise `OutputError` where the output would be, hold or lie in its `source`."""
    out, source = real_path(folder), real_path(source)
    if out.is_relative_to(source) or source.is_relative_to(out):
        raise OutputError(f"{folder}: is, holds or lies in the source folder {source}; choose another folder")


def refuse_full_disk(folder: Path, needed: int, reclaimed: int = 0) -> None:
    """Raise `OutputError` if `needed` bytes do not fit beside all but the `reclaimed` ones."""
    free = shutil.disk_usage(folder).free + reclaimed
    if free < needed:
        raise OutputError(f"{folder}: {free} bytes are free, {needed} are needed; free some, or use another disk")


def is_apart(name: str) -> bool:
    """Whether `name` is hidden and not ours, as .git or .DS_Store: no part of a checkpoint, and in nobody's way."""
    return name.startswith(".") and whole_name(name) not in (LOCK_NAME, JOURNAL_NAME)
