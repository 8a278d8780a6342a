"""The output folder: empty or ours, locked while we write, and finished only when the manifest stands in it."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from converter.plan import Plan, ShardPlan
from converter.source import CONFIG_NAME, Source
from formats.container import Writer
from formats.errors import CheckpointError, OutputError
from formats.files import (
    PARTIAL_SUFFIX,
    hash_file,
    leaves,
    link_roots,
    lock,
    make_folder,
    publish,
    publish_bytes,
    read_blocks,
    read_small,
    real_path,
    remove,
    rename,
)
from formats.layout import BITS
from formats.manifest import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    SourceRecord,
    TensorRecord,
    read_manifest,
)
from formats.records import from_json, to_json
from formats.strict_json import canonical, parse_object

LOCK_NAME = ".int4-convert.lock"
JOURNAL_NAME = ".int4-convert.json"
RECORDS = (LOCK_NAME, JOURNAL_NAME, MANIFEST_NAME)
SPARE_BYTES = 64 << 20  # for index, journal and manifest
PARTIAL = re.compile(r"\.[0-9a-f]{8}" + re.escape(PARTIAL_SUFFIX) + "$")
QUANT_METHOD = "i4"


@dataclass(frozen=True)
class Journal:
    """What an unfinished folder holds of ours; a manifest is a journal too, with more to say."""

    files: tuple[FileRecord, ...]


class OutputDir:
    """Writes one checkpoint into `folder`; use as a context, record every shard, then `finish`.

    A folder of ours holds a record of its files, each with size and SHA-256: the journal, which names a file before the
    file takes its name, or the manifest. One rename turns the journal into the manifest at the end, and a manifest into
    the journal before anything is overwritten. A file that differs from the record is not ours, and is never touched.

    Raises `OutputError` for a folder that is the source, holds anything that is not ours, is finished already (unless
    `overwrite`), or lies on a full disk; `TemporaryError` when another run holds it.
    """

    def __init__(self, folder: Path, source: Source, plan: Plan, *, overwrite: bool = False) -> None:
        self.folder = folder
        self.source = source
        self.plan = plan
        self._overwrite = overwrite
        self._stack = ExitStack()
        self._files: list[FileRecord] = []
        self._source_files: list[FileRecord] = []
        self._tensors: list[TensorRecord] = []

    def __enter__(self) -> "OutputDir":
        self._refuse_source()
        make_folder(self.folder)
        with ExitStack() as stack:
            stack.enter_context(lock(self.folder / LOCK_NAME))
            ours = self._ours()
            self._refuse_full_disk(ours)
            self._clear(ours)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def writer(self, shard: ShardPlan) -> Iterator[Writer]:
        """Yield the writer of one shard; the shard takes its name when it is whole."""
        metadata = {"format": "pt", "i4.format_version": str(FORMAT_VERSION)}
        with publish(self.folder / shard.output) as file:
            writer = Writer(file, shard.stored, metadata)
            yield writer
            self._claim(shard.output, *writer.finish())

    def record(self, source_file: FileRecord, tensors: Sequence[TensorRecord]) -> None:
        """Note what a written shard was made from and holds."""
        self._source_files.append(source_file)
        self._tensors.extend(tensors)

    def finish(self) -> Manifest:
        """Write index, configuration and side files, then the manifest: the folder is a checkpoint from here on."""
        if len(self._files) > 1:
            self._write(INDEX_NAME, canonical(self._index()))
        for name in self.source.side_files:
            if name == CONFIG_NAME:
                self._write(name, self._config())
            else:
                self._copy(name)
        manifest = Manifest(
            FORMAT_VERSION,
            (),
            SourceRecord(self.source.id, self.source.revision, tuple(self._source_files)),
            self.plan.recipe,
            tuple(self._tensors),
            tuple(sorted(self._files, key=lambda file: file.name)),
        ).sealed()
        publish_bytes(self.folder / JOURNAL_NAME, manifest.to_bytes())
        rename(self.folder / JOURNAL_NAME, self.folder / MANIFEST_NAME)
        return manifest

    def _index(self) -> dict[str, Any]:
        weight_map = {name: shard.output for shard in self.plan.shards for name in shard.stored}
        return {"metadata": {"total_size": self.plan.sizes.stored_bytes}, "weight_map": weight_map}

    def _config(self) -> bytes:
        """The source's configuration, with what a loader has to know about the weights."""
        scheme = self.plan.recipe.scheme
        quantization = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": BITS,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
        }
        config = {**(self.source.config or {}), "quantization_config": quantization}
        return (json.dumps(config, indent=2) + "\n").encode()

    def _write(self, name: str, data: bytes) -> None:
        with publish(self.folder / name) as file:
            file.write(data)
            self._claim(name, len(data), hashlib.sha256(data).hexdigest())

    def _copy(self, name: str) -> None:
        target = self.folder / name
        make_folder(target.parent)
        digest, size = hashlib.sha256(), 0
        with publish(target) as file:
            for block in read_blocks(self.source.folder / name, self.source.roots):
                file.write(block)
                digest.update(block)
                size += len(block)
            self._claim(name, size, digest.hexdigest())

    def _claim(self, name: str, size: int, sha256: str) -> None:
        """Enter a file into the journal, before it takes its name."""
        self._files.append(FileRecord(name, size, sha256))
        self._write_journal()

    def _write_journal(self) -> None:
        publish_bytes(self.folder / JOURNAL_NAME, canonical(to_json(Journal(tuple(self._files)))))

    def _refuse_source(self) -> None:
        folder, source = real_path(self.folder), real_path(self.source.folder)
        if folder.is_relative_to(source) or source.is_relative_to(folder):
            raise OutputError(f"{self.folder}: is, holds or lies in the source folder {source}; choose another folder")

    def _ours(self) -> list[Path]:
        """Everything in the folder that this run may remove; raises `OutputError` if there is anything else."""
        try:
            recorded = self._recorded()
            everything = {path.relative_to(self.folder).as_posix(): path for path in leaves(self.folder)}
            found = {name: path for name, path in everything.items() if not _is_apart(name)}
            is_ours = {name: _is_ours(path, name, recorded) for name, path in found.items()}
        except CheckpointError as error:
            reason = str(error).partition(";")[0]  # without its advice
            raise OutputError(
                f"{self.folder}: cannot tell which files are ours ({reason}); remove the folder, or choose another"
            ) from None
        if foreign := [name for name in found if not is_ours[name]]:
            raise OutputError(
                f"{self.folder}: holds files that int4-convert did not write, or that changed since "
                f"({', '.join(foreign[:5])}); remove them, or choose an empty or new folder"
            )
        return [path for name, path in found.items() if name not in RECORDS]

    def _recorded(self) -> frozenset[FileRecord] | None:
        """The files that the manifest or journal of an earlier run names, or None if there is neither."""
        manifest, journal = self.folder / MANIFEST_NAME, self.folder / JOURNAL_NAME
        if manifest.exists() and not self._overwrite:
            raise OutputError(
                f"{self.folder}: holds a finished checkpoint; give --overwrite to replace it, or another folder"
            )
        if manifest.exists():
            return frozenset(read_manifest(self.folder).files)
        if journal.exists():
            fields = parse_object(read_small(journal, link_roots(self.folder)), str(journal))
            return frozenset(from_json(Journal, {"files": fields.get("files")}, str(journal)).files)
        return None

    def _clear(self, ours: list[Path]) -> None:
        """Remove what an earlier run left, and begin a journal."""
        manifest = self.folder / MANIFEST_NAME
        if manifest.exists():  # first: no finished-looking folder with parts missing
            rename(manifest, self.folder / JOURNAL_NAME)
        for path in ours:
            remove(path)
            for parent in path.relative_to(self.folder).parents[:-1]:
                if not leaves(self.folder / parent):
                    remove(self.folder / parent)
        self._write_journal()

    def _refuse_full_disk(self, ours: list[Path]) -> None:
        side_files = sum((self.source.folder / name).stat().st_size for name in self.source.side_files)
        copies = 1 if self.plan.recipe.calibration is None else 2  # calibration keeps its layers until the end
        needed = copies * self.plan.sizes.stored_bytes + side_files + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free + sum(path.stat().st_size for path in ours)
        if free < needed:
            raise OutputError(
                f"{self.folder}: {free} bytes are free, {needed} are needed; free some, or use another disk"
            )


def _is_apart(name: str) -> bool:
    """Whether `name` is hidden and not ours, as .git or .DS_Store: no part of a checkpoint, and in nobody's way."""
    return name.startswith(".") and PARTIAL.sub("", name) not in RECORDS


def _is_ours(path: Path, name: str, recorded: frozenset[FileRecord] | None) -> bool:
    """Whether an earlier run left `path`: as its record says, or half-made, or a folder that it emptied."""
    if path.is_symlink():
        return False
    if name in RECORDS:
        return True
    if recorded is None:  # before there is a record there is only a half-made one
        return PARTIAL.sub("", name) == JOURNAL_NAME
    if path.is_dir() or PARTIAL.search(name):
        return True
    size = path.stat().st_size
    if not any((file.name, file.size) == (name, size) for file in recorded):
        return False
    return path.is_file() and FileRecord(name, *hash_file(path)) in recorded
