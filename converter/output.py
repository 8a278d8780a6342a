"""The output folder: empty or ours, locked while we write, and finished only when the manifest stands in it."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from converter.plan import Plan, ShardPlan
from converter.source import CONFIG_NAME, Source
from formats.container import Writer
from formats.errors import OutputError
from formats.files import PARTIAL_SUFFIX, lock, publish, publish_bytes, read_blocks, read_small, write_all
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
from formats.strict_json import canonical, parse_object

LOCK_NAME = ".int4-convert.lock"
JOURNAL_NAME = ".int4-convert.json"  # which files of an unfinished folder are ours
SPARE_BYTES = 64 << 20  # for side files, index and manifest
PARTIAL = re.compile(r"\.[0-9a-f]{8}" + re.escape(PARTIAL_SUFFIX) + "$")
QUANT_METHOD = "i4"


class OutputDir:
    """Writes one checkpoint into `folder`; use as a context, record every shard, then `finish`.

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made a folder ({error.strerror}); choose another") from None
        with ExitStack() as stack:
            stack.enter_context(lock(self.folder / LOCK_NAME))
            self._take_over()
            self._refuse_full_disk()
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
        with publish(self.folder / shard.output) as fd:
            writer = Writer(fd, shard.stored, metadata)
            yield writer
            size, sha256 = writer.finish()
        self._files.append(FileRecord(shard.output, size, sha256))

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
        publish_bytes(self.folder / MANIFEST_NAME, manifest.to_bytes())
        (self.folder / JOURNAL_NAME).unlink()
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
        publish_bytes(self.folder / name, data)
        self._files.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))

    def _copy(self, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with publish(target) as fd:
            for block in read_blocks(self.source.folder / name, self.source.roots):
                write_all(fd, block)
                digest.update(block)
                size += len(block)
        self._files.append(FileRecord(name, size, digest.hexdigest()))

    def _refuse_source(self) -> None:
        folder, source = self.folder.resolve(), self.source.folder.resolve()
        if folder.is_relative_to(source) or source.is_relative_to(folder):
            raise OutputError(f"{self.folder}: is, holds or lies in the source folder {source}; choose another folder")

    def _take_over(self) -> None:
        """Make sure that every file in the folder is ours, and remove what this run will not replace."""
        wanted, owned = self._names(), self._owned() | {LOCK_NAME, JOURNAL_NAME}
        present = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if not path.is_dir()}
        partial = {name for name in present if PARTIAL.sub("", name) in owned} - owned
        if foreign := sorted(present - owned - partial):
            raise OutputError(
                f"{self.folder}: holds files that int4-convert did not write ({', '.join(foreign[:5])}); "
                "choose an empty or new folder"
            )
        stale = (owned & present) - wanted - {LOCK_NAME, JOURNAL_NAME}
        publish_bytes(self.folder / JOURNAL_NAME, canonical({"files": sorted(wanted | stale)}))
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)  # first: no finished-looking folder with parts missing
        for name in sorted(partial | stale):
            (self.folder / name).unlink(missing_ok=True)

    def _names(self) -> set[str]:
        """Every file that this run will write."""
        names = {shard.output for shard in self.plan.shards} | set(self.source.side_files) | {MANIFEST_NAME}
        return names | {INDEX_NAME} if len(self.plan.shards) > 1 else names

    def _owned(self) -> set[str]:
        """The files that an earlier run wrote, or meant to, by the manifest or journal that it left."""
        manifest, journal = self.folder / MANIFEST_NAME, self.folder / JOURNAL_NAME
        if manifest.exists():
            if not self._overwrite:
                raise OutputError(
                    f"{self.folder}: holds a finished checkpoint; give --overwrite to replace it, or another folder"
                )
            return {file.name for file in read_manifest(self.folder).files} | {MANIFEST_NAME}
        if journal.exists():
            return set(parse_object(read_small(journal), str(journal)).get("files", ()))
        return set()

    def _refuse_full_disk(self) -> None:
        needed = self.plan.sizes.stored_bytes + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OutputError(
                f"{self.folder}: {free} bytes are free, {needed} are needed; free some, or use another disk"
            )
