"""The checkpoint to convert: a folder or a Hub repository, pinned, with every header checked before any work."""

import re
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from converter.fp8 import BlockScaled, block_scaled, block_size
from converter.packed import QUANTIZATION_FILES, QUANTIZATION_KEYS, PackedMatrix, int4_layout, packed_matrices
from converter.side_files import WEIGHT_SUFFIXES, side_files
from converter.weights import FolderWeights, HubWeights, Weights
from formats.container import SUFFIX, Container
from formats.errors import CheckpointError, Int4Warning, TemporaryError, UsageError, some
from formats.files import link_roots, local_folder, read_small, safe_name
from formats.hub import download, list_files
from formats.interop.base import Layout
from formats.layout import TensorSpec
from formats.strict_json import parse_object
from formats.tensors import read_tensor, tensor_from

CONFIG_NAME = "config.json"
PLAIN_INDEX_NAME = "model.safetensors.index.json"  # of weights that are not in this format
SINGLE_NAME = "model" + SUFFIX

# The weights of the model, by their names; a variant has a dot before its suffix, as in model.fp16.safetensors.
MODEL_FILE = re.compile(r"model[^./]*\.safetensors")
OTHER_PARTS = f"*/*{SUFFIX}"  # of a model, in subfolders
HEADERS_AT_ONCE = 8

QUANTIZED_SUFFIXES = (
    ".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_zero_point",
    ".weight.absmax", ".weight.quant_state", ".weight_g_idx", ".g_idx",
)  # fmt: skip
QUANTIZED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0")


@dataclass(frozen=True)
class Source:
    """A checked checkpoint: `shards` maps each weight file to its tensors, in file order, as the model has them.

    Those in `fp8` and `packed` are stored otherwise, with scales and the like, which are not listed; the latter are in
    int4 already, by a `layout` of another format.
    """

    id: str
    revision: str | None
    folder: Path
    roots: tuple[Path, ...]  # no file outside them is opened, whatever a link says
    config: dict[str, Any] | None
    shards: dict[str, dict[str, TensorSpec]]
    side_files: tuple[str, ...]
    weights: Weights
    fp8: dict[str, BlockScaled]
    layout: Layout | None
    packed: dict[str, PackedMatrix]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for tensors in self.shards.values() for spec in tensors.values())

    @property
    def staged_bytes(self) -> int:
        """Bytes of weights that are at most held beside the output."""
        return self.weights.staged_bytes(self.shards)

    @property
    def missing_bytes(self) -> int:
        """Bytes of weight files that are still to be fetched."""
        return sum(self.weights.missing_bytes(shard) for shard in self.shards)

    def open(self, shard: str) -> Container:
        """Open a weight file for reading, fetched first where it is not on this machine."""
        return self.weights.open(shard)

    def read(self, name: str) -> Tensor:
        """A tensor as the model has it; not one that is `packed`."""
        with self.open(self.shard_of[name]) as container:
            tensor = read_tensor(container, name)
        return self.decoded(name, tensor, 0) if name in self.fp8 else tensor

    def matrices(self, name: str) -> Iterator[Tensor]:
        """The matrices of a tensor as the model has them, one after the other: a stack may be larger than memory."""
        with self.open(self.shard_of[name]) as container:
            entry = container.tensors[name]
            if len(entry.spec.shape) == 2:
                yield self.read(name)
                return
            spec = TensorSpec(entry.spec.dtype, entry.spec.shape[1:])
            for start in range(entry.start, entry.end, spec.nbytes):
                data = bytearray(spec.nbytes)
                container.read_into(memoryview(data), start)
                yield tensor_from(data, spec)

    def decoded(self, name: str, rows: Tensor, first: int) -> Tensor:
        """Stored `rows` of a tensor in `fp8`, from `first` on, as the model has them."""
        stored = self.fp8[name]
        return stored.decode(rows, first, self._read_beside(name, stored.shard, stored.scale))

    def files_for(self, shard: str) -> set[str]:
        """The weight files that are read for the tensors of `shard`: itself, and those with scales and the like."""
        names = self.shards[shard]
        beside = {self.fp8[name].shard for name in names if name in self.fp8}
        parts = (self.packed[name].parts for name in names if name in self.packed)
        return {shard} | beside | {file for found in parts for file, _ in found.values()}

    def stored_name(self, name: str) -> str:
        """The tensor of its file that is read, chunk by chunk, for the tensor `name` of the model."""
        return self.packed[name].words if name in self.packed else name

    def read_parts(self, name: str) -> dict[str, Tensor]:
        """What stands beside the words of a matrix in int4."""
        matrix = self.packed[name]
        parts = {part: shard for part, (shard, _) in matrix.parts.items() if part != matrix.layout.words}
        return {part: self._read_beside(name, shard, matrix.stored(part)) for part, shard in parts.items()}

    def _read_beside(self, name: str, shard: str, stored: str) -> Tensor:
        """The tensor `stored` in `shard`, for the tensor `name` of the model, whose own file is worked on."""
        if shard != self.shard_of[name]:
            return self.weights.read(shard, stored)
        with self.open(shard) as container:
            return read_tensor(container, stored)

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """The weight file of each tensor."""
        return {name: shard for shard, tensors in self.shards.items() for name in tensors}


def open_source(
    model: str,
    revision: str | None = None,
    *,
    staging: Path | None = None,
    headers_only: bool = False,
    quiet: bool = False,
) -> Source:
    """Open a folder, or else the Hub repository `model` at `revision`, resolved to one commit.

    Of a repository weights are fetched when they are opened, only their headers now; into `staging` where it is given,
    else into the Hub cache. `headers_only` leaves out side files too. `quiet` hides the bars of downloads. Raises
    `CheckpointError` for anything that cannot be converted whole, `HubError` and `TemporaryError` from the Hub,
    `UsageError` for a name that is neither.
    """
    if local := local_folder(model):
        if revision is not None:
            raise UsageError(f"{model}: is a folder, which has no revision {revision!r}; leave --revision out")
        return _read(local, local.resolve().name, None, FolderWeights(local, link_roots(local.resolve())))
    only = [CONFIG_NAME, PLAIN_INDEX_NAME] if headers_only else None
    folder = download(model, revision, allow=only, ignore=[f"*{suffix}" for suffix in WEIGHT_SUFFIXES], quiet=quiet)
    commit = folder.name
    weights: Weights
    try:
        files = list_files(model, commit)
        weights = HubWeights(model, commit, files, staging, quiet=quiet)
        has_parts = any(fnmatchcase(name, OTHER_PARTS) for name in files)
    except TemporaryError:
        if not all((folder / name).exists() for name in _weight_files(folder, link_roots(folder))):
            raise
        weights, has_parts = FolderWeights(folder, link_roots(folder)), True  # for all that can be known here
        text = f"{model}: the Hub cannot be reached; the files in its cache are taken for all of {commit}"
        warnings.warn(text, Int4Warning, stacklevel=2)
    source = _read(folder, model, commit, weights)
    if headers_only or not has_parts:
        return source
    download(model, commit, allow=[OTHER_PARTS], ignore=[*source.shards], quiet=quiet)
    return replace(source, side_files=_copied(folder, source.roots, source.shards, source.layout))


def _read(folder: Path, name: str, commit: str | None, weights: Weights) -> Source:
    roots = link_roots(folder.resolve())
    config = _read_config(folder, roots)
    block = block_size(config)
    layout = None if block is not None else int4_layout(config or {}, str(folder / CONFIG_NAME))
    shards = _read_shards(folder, roots, weights)
    fp8 = {} if block is None else block_scaled(shards, block, str(folder))
    packed = {} if layout is None else packed_matrices(shards, layout, _dtype(config), str(folder))
    shards = _as_meant(shards, fp8, packed)
    _refuse_quantized(folder, shards)
    if layout is not None:
        config = {key: value for key, value in (config or {}).items() if key not in QUANTIZATION_KEYS}
    copied = _copied(folder, roots, shards, layout)
    return Source(name, commit, folder, roots, config, shards, copied, weights, fp8, layout, packed)


def _copied(folder: Path, roots: tuple[Path, ...], shards: Collection[str], layout: Layout | None) -> tuple[str, ...]:
    """The side files, but for those about the quantisation of a source that is in int4 already."""
    left_out = () if layout is None else QUANTIZATION_FILES
    return tuple(name for name in side_files(folder, roots, shards) if name not in left_out)


def _as_meant(
    shards: dict[str, dict[str, TensorSpec]], fp8: dict[str, BlockScaled], packed: dict[str, PackedMatrix]
) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each shard as the model has them, without those that say how they are stored."""
    meant = {name: (name, stored.meant) for name, stored in fp8.items()}
    meant |= {matrix.words: (name, matrix.meant) for name, matrix in packed.items()}
    others = {stored.scale for stored in fp8.values()}
    others |= {matrix.stored(part) for matrix in packed.values() for part in matrix.parts} - meant.keys()
    return {
        shard: dict(meant.get(name, (name, spec)) for name, spec in tensors.items() if name not in others)
        for shard, tensors in shards.items()
    }


def _read_config(folder: Path, roots: tuple[Path, ...]) -> dict[str, Any] | None:
    path = folder / CONFIG_NAME
    if not path.exists():
        return None
    return parse_object(read_small(path, roots), str(path), constants=True)


def _dtype(config: dict[str, Any] | None) -> str:
    """The type of the model's weights: F16 where its configuration says so, else BF16."""
    config = config or {}
    return "F16" if "float16" in (config.get("dtype"), config.get("torch_dtype")) else "BF16"


def _read_index(path: Path, roots: tuple[Path, ...]) -> tuple[dict[str, str], Any]:
    """The file of each tensor, and the size of all of them as the index has it."""
    index = parse_object(read_small(path, roots), str(path))
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: has no weight_map from tensor names to file names; fetch it again")
    for name in sorted(set(weight_map.values())):
        safe_name(name, str(path))
        if not name.endswith(SUFFIX):
            raise CheckpointError(f"{path}: names {name!r}; expected only {SUFFIX} files: nothing else is ever opened")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _weight_files(folder: Path, roots: tuple[Path, ...]) -> list[str]:
    """The names of the weight files, by the index if there is one."""
    index = folder / PLAIN_INDEX_NAME
    return sorted(set(_read_index(index, roots)[0].values())) if index.exists() else [SINGLE_NAME]


def _read_shards(folder: Path, roots: tuple[Path, ...], weights: Weights) -> dict[str, dict[str, TensorSpec]]:
    index = folder / PLAIN_INDEX_NAME
    if not index.exists():
        if not weights.has(SINGLE_NAME):
            raise CheckpointError(
                f"{folder}: holds neither {PLAIN_INDEX_NAME} nor {SINGLE_NAME}; {_found_instead(weights)}"
            )
        _refuse_strays(folder, weights, {SINGLE_NAME}, SINGLE_NAME)
        return {SINGLE_NAME: weights.header(SINGLE_NAME)}
    weight_map, total_size = _read_index(index, roots)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not weights.has(name)]
    if missing:
        raise CheckpointError(f"{index}: names {some(missing)} which are not in the folder; fetch them again")
    _refuse_strays(folder, weights, set(names), PLAIN_INDEX_NAME)
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        shards = dict(zip(names, pool.map(weights.header, names), strict=True))
    _compare_with_index(weight_map, shards, index)
    found = sum(spec.nbytes for tensors in shards.values() for spec in tensors.values())
    if total_size not in (None, found):
        text = f"{index}: total_size is {total_size!r:.40}, its shards hold {found} bytes; the shards count"
        warnings.warn(text, Int4Warning, stacklevel=2)
    return shards


def _refuse_strays(folder: Path, weights: Weights, names: set[str], origin: str) -> None:
    """A weight file that would be left out may be stale, or half of the model: only its owner knows."""
    found = {name for name in weights.names() if MODEL_FILE.fullmatch(name)}
    if strays := sorted(found - names):
        raise CheckpointError(
            f"{folder}: holds {some(strays)} beside the weights of {origin}; remove what is not part of the model, "
            f"or fetch the {PLAIN_INDEX_NAME} that names every file"
        )


def _compare_with_index(weight_map: dict[str, str], shards: dict[str, dict[str, TensorSpec]], index: Path) -> None:
    found: dict[str, str] = {}
    for shard, tensors in shards.items():
        for name in tensors:
            if name in found:
                raise CheckpointError(
                    f"{index}: tensor {name!r} is in {found[name]} and in {shard}; expected one place"
                )
            found[name] = shard
    if missing := [name for name in sorted(weight_map) if name not in found]:
        raise CheckpointError(f"{index}: names tensors that no shard holds: {some(missing)}; fetch the shards again")
    if extra := [name for name in sorted(found) if found[name] != weight_map.get(name)]:
        raise CheckpointError(f"{index}: does not list, or lists elsewhere, tensors of the shards: {some(extra)}")


def _refuse_quantized(folder: Path, shards: dict[str, dict[str, TensorSpec]]) -> None:
    names = {name for tensors in shards.values() for name in tensors}
    for shard, tensors in shards.items():
        for name, spec in tensors.items():
            is_mlx = spec.dtype == "U32" and f"{name.removesuffix('.weight')}.scales" in names
            is_int8 = spec.dtype in ("I8", "U8") and name.endswith(".weight") and len(spec.shape) == 2
            if name.endswith(QUANTIZED_SUFFIXES) or spec.dtype in QUANTIZED_DTYPES or is_mlx or is_int8:
                raise CheckpointError(
                    f"{folder / shard}: tensor {name!r} ({spec}) belongs to a model that is already quantised; "
                    "expected 16- or 32-bit weights: convert the model that it was made from"
                )


def _found_instead(weights: Weights) -> str:
    files = [name for name in weights.names() if name.endswith(WEIGHT_SUFFIXES)]
    return (
        f"found {some(files) or 'no weight files'}. Only safetensors files of these names are read, and pickled "
        "weights are never opened: save the model again with transformers' save_pretrained"
    )
