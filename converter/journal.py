"""What an unfinished output folder says of itself: what it is of, and every file of it that is ours.

The journal names a side file before the file takes its name. A shard has a record of its own, beside the others in a
hidden folder, so that shards can be written at the same time and by several processes; it is what resuming rests on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from converter.folder import HIDDEN
from converter.plan import Plan, ShardPlan
from formats.errors import CheckpointError
from formats.files import clear_folder, link_roots, make_folder, publish_bytes, read_small
from formats.manifest import SHARD_SUFFIX, FileRecord, Manifest, Recipe, SourceRecord, TensorRecord
from formats.records import from_json, to_json
from formats.strict_json import canonical, parse_object

SHARDS_NAME = f"{HIDDEN}-shards"
OURS = re.compile(rf"model(-\d+-of-\d+)?{re.escape(SHARD_SUFFIX)}\.json")


@dataclass(frozen=True)
class Journal:
    """What an unfinished folder is of, and its side files; a manifest is a journal too, with more to say."""

    source: SourceRecord
    recipe: Recipe
    files: tuple[FileRecord, ...]

    def differences(self, source: SourceRecord, recipe: Recipe) -> str:
        """In words, what of the recorded source and recipe is not that of `source` and `recipe`; empty if nothing."""
        pairs = {f"source {name}": (getattr(self.source, name), getattr(source, name)) for name in ("id", "revision")}
        names = [field.name for field in fields(recipe)]
        pairs |= {name: (getattr(self.recipe, name), getattr(recipe, name)) for name in names}
        found = [f"{name} {old!r} instead of {new!r}" for name, (old, new) in pairs.items() if old != new]
        return ", ".join(found)


@dataclass(frozen=True)
class ShardRecord:
    """A shard that is written: its file, the file of the source that it was made from, and what it holds."""

    file: FileRecord
    source: FileRecord
    tensors: tuple[TensorRecord, ...]

    def carries_out(self, shard: ShardPlan) -> bool:
        """Whether it is a record of what `shard` plans, of the same tensors in the same forms."""
        planned = {tensor.record(shard.output, {}, None) for tensor in shard.tensors}
        written = {replace(row, sha256=(), error=None) for row in self.tensors}
        return (self.file.name, self.source.name, written) == (shard.output, shard.source, planned)


def read_journal(path: Path, plan: Plan) -> tuple[Journal, dict[str, ShardRecord]]:
    """The journal in `path`, and the records of shards of `plan` if it is a whole manifest but for its name.

    Raises `CheckpointError`.
    """
    raw = parse_object(read_small(path, link_roots(path.parent)), str(path))
    journal = from_json(Journal, {field.name: raw.get(field.name) for field in fields(Journal)}, str(path))
    if raw.keys() != {field.name for field in fields(Manifest)}:
        return journal, {}
    return journal, _records_of(from_json(Manifest, raw, str(path)), plan)


def _records_of(manifest: Manifest, plan: Plan) -> dict[str, ShardRecord]:
    """The records of the shards of `plan`, by their names, that `manifest` contains."""
    files, sources = ({file.name: file for file in found} for found in (manifest.files, manifest.source.files))
    return {
        shard.output: ShardRecord(
            files[shard.output],
            sources[shard.source],
            tuple(row for row in manifest.tensors if row.file == shard.output),
        )
        for shard in plan.shards
        if shard.output in files and shard.source in sources
    }


class ShardRecords:
    """A file a shard, in a hidden folder of `out_dir`."""

    def __init__(self, out_dir: Path) -> None:
        self.folder = out_dir / SHARDS_NAME

    def read(self) -> dict[str, ShardRecord]:
        """Every record by the name of its shard; one that cannot be read counts as missing."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                record = from_json(ShardRecord, parse_object(read_small(path), str(path)), str(path))
            except CheckpointError:  # its shard is made again
                continue
            found[record.file.name] = record
        return found

    def write(self, record: ShardRecord) -> None:
        """Keep the record of a shard, before the shard takes its name."""
        make_folder(self.folder)
        publish_bytes(self.folder / f"{record.file.name}.json", canonical(to_json(record)))

    def clear(self, keep: Mapping[str, ShardRecord]) -> None:
        """Remove all records but those to `keep`, and the folder if nothing else is in it."""
        clear_folder(self.folder, OURS, {f"{name}.json" for name in keep})
