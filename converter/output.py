"""The output folder: empty or ours, locked while we write, and finished only when the manifest stands in it."""

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from converter.folder import (
    HIDDEN,
    JOURNAL_NAME,
    LOCK_NAME,
    SPARE_BYTES,
    is_apart,
    refuse_full_disk,
    refuse_overlap,
)
from converter.journal import Journal, ShardRecord, ShardRecords, read_journal
from converter.plan import Plan, ShardPlan
from converter.source import CONFIG_NAME, Source
from formats.container import Writer
from formats.errors import CheckpointError, Int4Warning, OutputError, TemporaryError, some
from formats.files import (
    hash_file,
    leaves,
    lock,
    make_folder,
    publish,
    publish_bytes,
    read_small,
    remove_below,
    rename,
    whole_name,
)
from formats.manifest import (
    EVALUATION_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    SHA256,
    SHARD_METADATA,
    FileRecord,
    Manifest,
    SourceRecord,
    features_of,
    quantization_config,
    read_manifest,
)
from formats.records import to_json
from formats.strict_json import canonical, parse_object, readable

RECORDS = (LOCK_NAME, JOURNAL_NAME, MANIFEST_NAME)
HASHING_THREADS = 4


class OutputDir:
    """Writes one checkpoint into `folder`; use as a context, write and `record` the `remaining` shards, then `finish`.

    A folder of ours holds a record of its files, each with size and SHA-256: journal and records of shards, which name
    a file before the file takes its name, or the manifest. One rename turns the journal into the manifest at the end,
    and a manifest into the journal before anything is overwritten. Another file is not ours, and is never touched.

    What an interrupted run of the same plan finished is kept, if its bytes and those of its source are as recorded.

    Raises `OutputError` for a folder that is the source, holds anything that is not ours or belongs to another
    conversion, is finished already (unless `overwrite`), or lies on a full disk; `TemporaryError` when another run
    holds it.
    """

    def __init__(self, folder: Path, source: Source, plan: Plan, *, overwrite: bool = False) -> None:
        self.folder = folder
        self.source = source
        self.plan = plan
        self._overwrite = overwrite
        self._stack = ExitStack()
        self._files: list[FileRecord] = []
        self._shards: dict[str, ShardRecord] = {}
        self._records = ShardRecords(folder)

    def __enter__(self) -> "OutputDir":
        refuse_overlap(self.folder, self.source.folder)
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

    @property
    def kept(self) -> dict[str, ShardRecord]:
        """The shards that are written, by their names."""
        return dict(self._shards)

    def keep(self, kept: Mapping[str, ShardRecord]) -> None:
        """Count `kept` as written: what the process says that has entered, to others that write with it."""
        self._shards = dict(kept)

    @property
    def remaining(self) -> list[ShardPlan]:
        """The shards that are still to be written."""
        return [shard for shard in self.plan.shards if shard.output not in self._shards]

    @contextmanager
    def writer(self, shard: ShardPlan) -> Iterator[Writer]:
        """Yield the writer of one shard, which takes its name at the end: `record` it as the last thing before."""
        with publish(self.folder / shard.output) as file, Writer(file, shard.stored, SHARD_METADATA) as writer:
            yield writer

    def record(self, record: ShardRecord) -> None:
        """Note what a written shard was made from and holds; any thread may."""
        self._records.write(record)
        self._shards[record.file.name] = record

    def finish(self) -> Manifest:
        """Write index, configuration and side files, then the manifest: the folder is a checkpoint from here on."""
        if len(self.plan.shards) > 1:
            self._write(INDEX_NAME, canonical(self._index()))
        for name in self.source.side_files:
            if name == CONFIG_NAME:
                self._write(name, self._config())
            else:
                self._copy(name)
        written = {**self._records.read(), **self._shards}  # of other processes too
        if lost := [shard.output for shard in self.plan.shards if shard.output not in written]:
            raise TemporaryError(f"{self.folder}: the records of {some(lost)} cannot be read; run the same again")
        shards = [written[shard.output] for shard in self.plan.shards]
        files = [*self._files, *(shard.file for shard in shards)]
        rows = tuple(row for shard in shards for row in shard.tensors)
        manifest = Manifest(
            FORMAT_VERSION,
            features_of(rows),
            replace(self._source_record(), files=tuple(shard.source for shard in shards)),
            self.plan.recipe,
            rows,
            tuple(sorted(files, key=lambda file: file.name)),
        ).sealed()
        publish_bytes(self.folder / JOURNAL_NAME, manifest.to_bytes())
        self._records.clear(keep={})
        rename(self.folder / JOURNAL_NAME, self.folder / MANIFEST_NAME)
        return manifest

    def _source_record(self) -> SourceRecord:
        return SourceRecord(self.source.id, self.source.revision, ())

    def _index(self) -> dict[str, Any]:
        weight_map = {name: shard.output for shard in self.plan.shards for name in shard.stored}
        return {"metadata": {"total_size": self.plan.sizes.stored_bytes}, "weight_map": weight_map}

    def _config(self) -> bytes:
        """The source's configuration, with what a loader has to know about the weights."""
        quantization = quantization_config(self.plan.recipe.scheme)
        config = {**(self.source.config or {}), "quantization_config": quantization}
        return readable(config)

    def _write(self, name: str, data: bytes) -> None:
        with publish(self.folder / name) as file:
            file.write(data, 0)
            self._claim(name, len(data), hashlib.sha256(data).hexdigest())

    def _copy(self, name: str) -> None:
        target = self.folder / name
        make_folder(target.parent)
        with publish(target) as file:
            self._claim(name, *file.copy(self.source.folder / name, self.source.roots))

    def _claim(self, name: str, size: int, sha256: str) -> None:
        """Enter a side file into the journal, before it takes its name."""
        self._files.append(FileRecord(name, size, sha256))
        self._write_journal()

    def _write_journal(self) -> None:
        journal = Journal(self._source_record(), self.plan.recipe, tuple(self._files))
        publish_bytes(self.folder / JOURNAL_NAME, canonical(to_json(journal)))

    def _ours(self) -> list[Path]:
        """Everything in the folder that this run may remove; raises `OutputError` if there is anything else."""
        try:
            files, shards = self._recorded()
            everything = {path.relative_to(self.folder).as_posix(): path for path in leaves(self.folder)}
            found = {name: path for name, path in everything.items() if not is_apart(name) or _is_linked(name, path)}
            sound = _sound(found, files)
            self._shards = self._kept(shards, sound)
        except CheckpointError as error:
            reason = str(error).partition(";")[0]  # without its advice
            raise OutputError(
                f"{self.folder}: cannot tell which files are ours ({reason}); remove the folder, or choose another"
            ) from None
        if foreign := [name for name, path in found.items() if not _is_ours(path, name, sound | shards.keys(), files)]:
            raise OutputError(
                f"{self.folder}: holds files that int4-convert did not write, or that changed since "
                f"({', '.join(foreign[:5])}); remove them, or choose an empty or new folder"
            )
        return [path for name, path in found.items() if name not in RECORDS and name not in self._shards]

    def _recorded(self) -> tuple[frozenset[FileRecord] | None, dict[str, ShardRecord]]:
        """The files that an earlier run recorded (None: no record), and of an unfinished one the shards that it wrote.

        Raises `OutputError` where that run finished, or was another conversion, and may not be overwritten.
        """
        manifest, journal = self.folder / MANIFEST_NAME, self.folder / JOURNAL_NAME
        if manifest.exists() and not self._overwrite:
            raise OutputError(
                f"{self.folder}: holds a finished checkpoint; give --overwrite to replace it, or another folder"
            )
        if manifest.exists():
            return frozenset(read_manifest(self.folder).files) | _evaluation(self.folder), {}
        if not journal.exists():
            return None, {}
        earlier, shards = read_journal(journal, self.plan)
        shards |= self._records.read()
        files = frozenset(earlier.files) | {shard.file for shard in shards.values()} | _evaluation(self.folder)
        if other := earlier.differences(self._source_record(), self.plan.recipe):
            if not self._overwrite:
                raise OutputError(
                    f"{self.folder}: holds an unfinished conversion with {other}; run it again as it was begun, give "
                    "--overwrite to begin anew, or choose another folder"
                )
            return files, {}
        return files, shards

    def _kept(self, shards: dict[str, ShardRecord], sound: set[str]) -> dict[str, ShardRecord]:
        """Those of `shards` whose bytes are sound, and whose sources are known to be what they were made from.

        Raises `OutputError` where the source has changed since.
        """
        if damaged := [name for name in sorted(shards.keys() - sound) if (self.folder / name).exists()]:
            text = f"{self.folder}: {some(damaged)} changed since they were written; they are made again"
            warnings.warn(text, Int4Warning, stacklevel=2)
        kept = {name: record for name, record in shards.items() if name in sound}
        sources = {record.source.name: record.source for record in kept.values()}
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            answers = pool.map(self._same_source, sources.values())
            same = {name for name, found in zip(sources, answers, strict=True) if found}
        planned = {shard.output: shard for shard in self.plan.shards}
        ours = {n: record for n, record in kept.items() if n in planned and record.carries_out(planned[n])}
        changed = f"of other files than {some(sorted(sources.keys() - same))} of" if sources.keys() - same else ""
        if not changed and (others := sorted(kept.keys() - ours.keys())):
            changed = f"whose {some(others)} would hold other tensors by the index and config.json of"
        if changed and not self._overwrite:
            raise OutputError(
                f"{self.folder}: holds an unfinished conversion {changed} the source; give --overwrite to begin anew, "
                "or choose another folder"
            )
        # What was read from a file that has no record yet may have been another, or damaged on its way.
        return {n: record for n, record in ours.items() if self.source.files_for(record.source.name) <= same}

    def _same_source(self, file: FileRecord) -> bool:
        return file.name in self.source.shards and self.source.weights.same(file)

    def _clear(self, ours: list[Path]) -> None:
        """Remove what an earlier run left, but for the shards that are kept, and begin a journal."""
        manifest = self.folder / MANIFEST_NAME
        if manifest.exists():  # first: no finished-looking folder with parts missing
            rename(manifest, self.folder / JOURNAL_NAME)
        for path in ours:
            remove_below(self.folder, path)
        for record in self._shards.values():  # of one that was about to finish, only the journal had them
            self._records.write(record)
        self._records.clear(self._shards)
        self._write_journal()

    def _refuse_full_disk(self, ours: list[Path]) -> None:
        side_files = sum((self.source.folder / name).stat().st_size for name in self.source.side_files)
        copies = 1 if self.plan.recipe.calibration is None else 2  # calibration keeps its layers until the end
        kept = sum(record.file.size for record in self._shards.values())
        needed = copies * self.plan.sizes.stored_bytes - kept + side_files + self.source.staged_bytes + SPARE_BYTES
        refuse_full_disk(self.folder, needed, sum(path.stat().st_size for path in ours))


def _evaluation(folder: Path) -> frozenset[FileRecord]:
    """The file that int4-eval left in `folder`, if it did: its figures are of the checkpoint there, and go with it."""
    path = folder / EVALUATION_NAME
    try:
        figures = parse_object(read_small(path, (folder,)), str(path))
        is_of_eval = SHA256.fullmatch(str(figures.get("checkpoint"))) is not None
        return frozenset({FileRecord(EVALUATION_NAME, *hash_file(path))} if is_of_eval else ())
    except CheckpointError:  # there is none, or somebody else's
        return frozenset()


def _is_linked(name: str, path: Path) -> bool:
    """Whether a link stands where a hidden folder of ours would be, which is cleared in the end."""
    return name.startswith(HIDDEN) and path.is_symlink()


def _sound(paths: Mapping[str, Path], recorded: Collection[FileRecord] | None) -> set[str]:
    """The names of those of `paths` whose size and SHA-256 are as recorded; several are read at once."""

    def is_sound(file: FileRecord) -> bool:
        path = paths.get(file.name)
        if path is None or path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
            return False
        return FileRecord(file.name, *hash_file(path)) == file

    files = list(recorded or ())
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return {file.name for file, sound in zip(files, pool.map(is_sound, files), strict=True) if sound}


def _is_ours(path: Path, name: str, ours: set[str], recorded: Collection[FileRecord] | None) -> bool:
    """Whether an earlier run left `path`: as its record says, or half-made, or a folder that it emptied."""
    if path.is_symlink():
        return False
    if name in RECORDS or name in ours:
        return True
    if recorded is None:  # before there is a record there is only a half-made one
        return whole_name(name) == JOURNAL_NAME
    return path.is_dir() or whole_name(name) != name
