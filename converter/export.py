"""The way out: an int4 checkpoint in the layout of another format, proven to hold the same weights."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

from torch import Tensor

from converter.folder import SPARE_BYTES, new_folder
from converter.orientation import model_types
from converter.pieces import Target, module_of
from converter.source import CONFIG_NAME, PLAIN_INDEX_NAME
from formats.checkpoint import Checkpoint
from formats.codec import Quantized
from formats.container import SUFFIX, Writer
from formats.errors import CheckpointError, some
from formats.files import link_roots, make_folder, publish, publish_bytes, read_small
from formats.interop import LAYOUTS
from formats.interop.base import is_head
from formats.interop.groups import can_split
from formats.layout import CODES_PER_WORD, Scheme, TensorSpec
from formats.manifest import INDEX_NAME, SHARD_SUFFIX, Manifest, TensorRecord
from formats.selection import FLOAT_DTYPES, KEPT_BY_DEFAULT, WEIGHT, is_fused_experts
from formats.strict_json import parse_object, readable
from formats.tensors import bytes_of

TEXT_CONFIG = "text_config"  # the part of a configuration that is of the text model
UNTIED = {"tie_word_embeddings": False}


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
    config = _config(checkpoint)
    target = target_for(checkpoint, to, group_size, model_types(config))
    manifest, files = checkpoint.manifest, _files(checkpoint, target)
    config |= _settings(config, manifest, target)
    side_files = [name for name in checkpoint.files if name not in (*files, INDEX_NAME, CONFIG_NAME)]
    total = sum(spec.nbytes for specs in files.values() for spec in specs.values())
    needed = total + sum(checkpoint.files[name].size for name in side_files) + SPARE_BYTES
    with new_folder(out_dir, checkpoint.folder, needed), checkpoint.opened() as stored:
        proofs: list[bool] = []
        for shard, specs in files.items():
            with publish(out_dir / _file_name(shard)) as file, Writer(file, specs, target.layout.metadata) as writer:
                for row in (row for row in manifest.tensors if row.file == shard):
                    tensors = [stored[name].read() for name in row.stored(manifest.recipe.scheme)]
                    if row.quantized:
                        proofs.append(_write(writer, row, tensors, target, checkpoint))
                    else:
                        writer.put(target.renamed(row.name), bytes_of(tensors[0]))
                    progress(sum(tensor.nbytes for tensor in tensors))
                writer.finish()
        if len(files) > 1:
            weight_map = {name: _file_name(shard) for shard, specs in files.items() for name in specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            publish_bytes(out_dir / PLAIN_INDEX_NAME, readable(index))
        for name in side_files:
            make_folder((out_dir / name).parent)
            with publish(out_dir / name) as file:
                file.copy(checkpoint.folder / name, link_roots(checkpoint.folder))
        publish_bytes(out_dir / CONFIG_NAME, readable(config))
    found, size = manifest.sizes, target.layout.scheme.group_size
    return Exported(to, size, found.quantized, len(proofs), found.kept, total, all(proofs))


def target_for(checkpoint: Checkpoint, to: str, group_size: int | None, types: tuple[str, ...]) -> Target:
    """The layout `to` for `checkpoint`, of a model of these types, in groups of `group_size` or of the size they have.

    Raises `CheckpointError`, which names the targets that would take it, for a matrix that it cannot hold.
    """
    scheme = checkpoint.manifest.recipe.scheme
    wanted = scheme if group_size is None else Scheme(group_size, scheme.symmetric)
    target = Target(LAYOUTS[to].for_export(wanted), types)
    for row in _matrices(checkpoint.manifest):
        where, columns = f"{checkpoint.folder}: tensor {row.name!r}", row.matrix.shape[-1]
        if not can_split(columns, scheme, wanted.group_size):
            raise CheckpointError(
                f"{where}: its groups of {scheme.group_size} in {columns} columns cannot be split into equal ones "
                f"of {wanted.group_size}; {_group_advice(checkpoint.manifest)}"
            )
        if reason := target.refusal(row):
            raise CheckpointError(f"{where}: {to} cannot hold it: {reason}; {_others(target, row)}")
    return target


def _matrices(manifest: Manifest) -> list[TensorRecord]:
    return [row for row in manifest.tensors if row.quantized]


def _group_advice(manifest: Manifest) -> str:
    scheme, common = manifest.recipe.scheme, 0
    for row in _matrices(manifest):
        one = scheme.groups(row.matrix.shape[-1]) == 1
        common = gcd(common, row.matrix.shape[-1], 0 if one else scheme.group_size)
    fits = common if common % CODES_PER_WORD == 0 else None
    return f"--group-size {fits}, or what divides it, is exact" if fits else "no size suits all of its matrices"


def _others(target: Target, row: TensorRecord) -> str:
    """In words, which other targets would take a matrix."""
    scheme = target.layout.scheme
    others = {name: replace(target, layout=LAYOUTS[name].for_export(scheme)) for name in LAYOUTS}
    found = [name for name in LAYOUTS if name != target.layout.name and not others[name].refusal(row)]
    return f"{some(found)} can" if found else "no target can: convert the model again with --exclude of it"


def _file_name(shard: str) -> str:
    return shard.removesuffix(SHARD_SUFFIX) + SUFFIX


def _files(checkpoint: Checkpoint, target: Target) -> dict[str, dict[str, TensorSpec]]:
    """The tensors to be written, by the shards that they come from; raises `CheckpointError` if two have one name."""
    files: dict[str, dict[str, TensorSpec]] = {shard: {} for shard in checkpoint.manifest.shards}
    seen: set[str] = set()
    for row in checkpoint.manifest.tensors:
        parts = {target.renamed(row.name): row.spec}
        if row.quantized:
            parts = {}
            for piece in target.pieces(row):
                parts |= piece.specs(row, target.layout)
        if taken := sorted(seen & parts.keys()):
            raise CheckpointError(
                f"{checkpoint.folder}: {row.name!r} would be written as {some(taken)}, which is taken"
            )
        seen.update(parts)
        files[row.file] |= parts
    return files


def _write(writer: Writer, row: TensorRecord, tensors: list[Tensor], target: Target, checkpoint: Checkpoint) -> bool:
    """Write a quantised tensor, each of its matrices proven; returns whether its zeros have the same sign."""
    scheme, columns = checkpoint.manifest.recipe.scheme, row.matrix.shape[-1]
    stored, same_signs = Quantized(*tensors), True
    for piece in target.pieces(row):
        try:
            parts, same = piece.relaid(stored, columns, scheme, target.layout)
        except CheckpointError as error:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {row.name!r}: {error}; {_others(target, row)}"
            ) from None
        for name, tensor in parts.items():
            writer.put(name, bytes_of(tensor))
        same_signs &= same
    return same_signs


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's configuration without its quantisation; nothing where it has none."""
    path = checkpoint.folder / CONFIG_NAME
    if CONFIG_NAME not in checkpoint.files:
        return {}
    config = parse_object(read_small(path, link_roots(checkpoint.folder)), str(path), constants=True)
    config.pop("quantization_config", None)
    return config


def _settings(config: dict[str, Any], manifest: Manifest, target: Target) -> dict[str, Any]:
    """What loaders of the other format have to know, for config.json."""
    quantized = [piece.module for row in _matrices(manifest) for piece in target.pieces(row)]
    kept = [row for row in manifest.tensors if not row.quantized and _may_be_linear(row)]
    found = target.layout.config(quantized, _rules([module_of(target.renamed(row.name)) for row in kept], quantized))
    if any(map(is_head, quantized)):  # then it is no longer the embedding
        found |= UNTIED
        if isinstance(text := config.get(TEXT_CONFIG), dict):
            found[TEXT_CONFIG] = text | UNTIED
    return found


def _may_be_linear(row: TensorRecord) -> bool:
    """Whether a tensor may be of a linear layer, whatever its name, or is one of experts."""
    is_matrix = len(row.shape) == 2 and row.dtype in FLOAT_DTYPES and row.name.endswith(WEIGHT)
    return is_matrix or is_fused_experts(row.name, row.spec)


def _rules(kept: list[str], quantized: list[str]) -> dict[str, str]:
    """For each kept module a regular expression that finds it and no quantised one, matched from the start of names.

    Programs compare it with names of their own, which may begin otherwise than those of the checkpoint, or have other
    parts. So it is the pattern by which the module is kept by default; where a quantised one has that too, the shortest
    end of its name that none of them has as a part; or else the name.
    """
    patterns = [pattern for pattern, _ in KEPT_BY_DEFAULT if not any(map(pattern.search, quantized))]
    names = "".join(f".{name}.\n" for name in quantized)

    def rule(name: str) -> str:
        if found := next((pattern.pattern for pattern in patterns if pattern.search(name)), None):
            return f".*(?i:{found})"
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in reversed(range(len(parts))) if not parts[i].isdecimal())
        end = next((end for end in ends if f".{end}." not in names), None)
        return f"{re.escape(name)}$" if end is None else rf"(.*\.)?{re.escape(end)}(\..*)?$"

    return {name: rule(name) for name in kept}
