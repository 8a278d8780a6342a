"""The way out: an int4 checkpoint in the layout of another format, proven to hold the same weights."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from torch import Tensor

from converter.output import LOCK_NAME, SPARE_BYTES, is_apart, refuse_full_disk, refuse_overlap
from converter.source import CONFIG_NAME
from converter.source import INDEX_NAME as TARGET_INDEX_NAME
from formats.checkpoint import Checkpoint
from formats.codec import Quantized
from formats.container import SUFFIX, Writer
from formats.errors import CheckpointError, OutputError, some
from formats.files import leaves, link_roots, lock, make_folder, publish, publish_bytes, read_small, remove_below
from formats.interop import LAYOUTS
from formats.interop.base import Layout
from formats.interop.groups import can_split, split
from formats.interop.proof import prove
from formats.layout import CODES_PER_WORD, Scheme, TensorSpec, scale_dtype_for
from formats.manifest import INDEX_NAME, SHARD_SUFFIX, Manifest, TensorRecord
from formats.selection import WEIGHT, never_quantized
from formats.strict_json import parse_object
from formats.tensors import bytes_of


@dataclass(frozen=True)
class Exported:
    """What was written: `tensors` in int4, of which so many were `checked` to mean the same weights, and others `kept`.

    `signed_zeros` is whether zeros have the same sign too.
    """

    to: str
    group_size: int
    tensors: int
    checked: int
    kept: int
    nbytes: int
    signed_zeros: bool


def export(
    checkpoint: Checkpoint,
    out_dir: Path,
    to: str,
    group_size: int | None = None,
    *,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Exported:
    """Write `checkpoint` in the layout `to` into `out_dir`, which is new or empty, one file for each of its shards.

    Groups are split into those of `group_size`, which repeat their scales, where it is given; `progress` is called with
    the bytes of each tensor read. The configuration comes last. Raises `CheckpointError` where the target cannot hold
    the same weights, or the checkpoint is damaged, `OutputError` where writing fails; then `out_dir` is left empty.
    """
    layout = layout_for(checkpoint, to, group_size)
    manifest, files = checkpoint.manifest, _files(checkpoint, layout)
    config = _config(checkpoint, layout)
    side_files = [name for name in checkpoint.files if name not in (*files, INDEX_NAME, CONFIG_NAME)]
    total = sum(spec.nbytes for specs in files.values() for spec in specs.values())
    needed = total + sum(checkpoint.files[name].size for name in side_files) + SPARE_BYTES
    with new_folder(out_dir, checkpoint.folder, needed), checkpoint.opened() as stored:
        proofs: list[bool] = []
        for shard, specs in files.items():
            with publish(out_dir / _file_name(shard)) as file, Writer(file, specs, layout.metadata) as writer:
                for row in (row for row in manifest.tensors if row.file == shard):
                    tensors = [stored[name].read() for name in row.stored(manifest.recipe.scheme)]
                    parts = {row.name: tensors[0]}
                    if row.quantized:
                        parts, same_signs = _relaid(row, tensors, layout, checkpoint)
                        proofs.append(same_signs)
                    for name, tensor in parts.items():
                        writer.put(name, bytes_of(tensor))
                    progress(sum(tensor.nbytes for tensor in tensors))
                writer.finish()
        if len(files) > 1:
            weight_map = {name: _file_name(shard) for shard, specs in files.items() for name in specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            publish_bytes(out_dir / TARGET_INDEX_NAME, _json(index))
        for name in side_files:
            make_folder((out_dir / name).parent)
            with publish(out_dir / name) as file:
                file.copy(checkpoint.folder / name, link_roots(checkpoint.folder))
        publish_bytes(out_dir / CONFIG_NAME, _json(config))
    found, size = manifest.sizes, layout.scheme.group_size
    return Exported(to, size, found.quantized, len(proofs), found.kept, total, all(proofs))


def layout_for(checkpoint: Checkpoint, to: str, group_size: int | None) -> Layout:
    """The layout `to` for the matrices of `checkpoint` in groups of `group_size`, or of the size they have.

    Raises `CheckpointError`, which names the targets that would take it, for a matrix that it cannot hold.
    """
    scheme = checkpoint.manifest.recipe.scheme
    wanted = scheme if group_size is None else Scheme(group_size, scheme.symmetric)
    for row in _matrices(checkpoint.manifest):
        where = f"{checkpoint.folder}: tensor {row.name!r}"
        if row.features:
            raise CheckpointError(
                f"{where}: is stored as {some(sorted(row.features))}, which no target is written with yet; convert the "
                "model again with --exclude of it"
            )
        if not can_split(row.shape[1], scheme, wanted.group_size):
            raise CheckpointError(
                f"{where}: its groups of {scheme.group_size} in {row.shape[1]} columns cannot be split into equal ones "
                f"of {wanted.group_size}; {_group_advice(checkpoint.manifest)}"
            )
        if reason := LAYOUTS[to].for_export(wanted).refusal(*row.shape):
            raise CheckpointError(f"{where}: {to} cannot hold it: {reason}; {_others(to, wanted, row)}")
    return LAYOUTS[to].for_export(wanted)


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


def _matrices(manifest: Manifest) -> list[TensorRecord]:
    return [row for row in manifest.tensors if row.quantized]


def _module(row: TensorRecord) -> str:
    """The module of a weight; of fused experts, which are parameters of theirs, the one that holds them."""
    return row.name.removesuffix(WEIGHT) if row.name.endswith(WEIGHT) else row.name.rpartition(".")[0]


def _group_advice(manifest: Manifest) -> str:
    scheme, common = manifest.recipe.scheme, 0
    for row in _matrices(manifest):
        one = scheme.groups(row.shape[1]) == 1
        common = gcd(common, row.shape[1], 0 if one else scheme.group_size)
    fits = common if common % CODES_PER_WORD == 0 else None
    return f"--group-size {fits}, or what divides it, is exact" if fits else "no size suits all of its matrices"


def _others(to: str, scheme: Scheme, row: TensorRecord) -> str:
    """In words, which other targets would take a matrix."""
    rows, columns = row.shape
    found = [name for name in LAYOUTS if name != to and not LAYOUTS[name].for_export(scheme).refusal(rows, columns)]
    return f"{some(found)} can" if found else "no target can"


def _file_name(shard: str) -> str:
    return shard.removesuffix(SHARD_SUFFIX) + SUFFIX


def _files(checkpoint: Checkpoint, layout: Layout) -> dict[str, dict[str, TensorSpec]]:
    """The tensors to be written, by the shards that they come from; raises `CheckpointError` if two have one name."""
    files: dict[str, dict[str, TensorSpec]] = {shard: {} for shard in checkpoint.manifest.shards}
    seen: set[str] = set()
    for row in checkpoint.manifest.tensors:
        parts = {row.name: row.spec}
        if row.quantized:
            rows, columns = row.shape
            specs = layout.specs(rows, columns, scale_dtype_for(row.dtype))
            parts = {f"{_module(row)}.{part}": spec for part, spec in specs.items()}
        if taken := sorted(seen & parts.keys()):
            raise CheckpointError(f"{checkpoint.folder}: {row.name!r} would be written as {taken}, which is taken")
        seen |= parts.keys()
        files[row.file] |= parts
    return files


def _relaid(
    row: TensorRecord, tensors: list[Tensor], layout: Layout, checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a matrix in `layout`, by their full names, proven; and whether its zeros have the same sign."""
    scheme, columns = checkpoint.manifest.recipe.scheme, row.shape[1]
    matrix = Quantized(tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None)
    try:
        parts = layout.relayout(split(matrix, columns, scheme, layout.scheme.group_size), columns)
        same_signs = prove(layout, parts, matrix, columns, scheme)
    except CheckpointError as error:
        others = _others(layout.name, layout.scheme, row)
        raise CheckpointError(f"{checkpoint.folder}: tensor {row.name!r}: {error}; {others}") from None
    return {f"{_module(row)}.{part}": tensor for part, tensor in parts.items()}, same_signs


def _config(checkpoint: Checkpoint, layout: Layout) -> dict[str, Any]:
    """The checkpoint's configuration, with what loaders of the other format have to know."""
    path, config = checkpoint.folder / CONFIG_NAME, {}
    if CONFIG_NAME in checkpoint.files:
        config = parse_object(read_small(path, link_roots(checkpoint.folder)), str(path), constants=True)
        config.pop("quantization_config", None)
    rows = checkpoint.manifest.tensors
    kept = [_module(row) for row in rows if not row.quantized and never_quantized(row.name, row.spec) is None]
    return {**config, **layout.config([_module(row) for row in rows if row.quantized], [*dict.fromkeys(kept)])}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
