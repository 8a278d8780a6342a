"""The manifest of an int4 checkpoint: what was made of what, by which recipe, and the digest of every byte."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.container import SUFFIX
from formats.errors import CheckpointError, UsageError
from formats.files import link_roots, read_small, safe_name
from formats.layout import BITS, ROW_WISE, Scheme, TensorSpec, stored_tensors
from formats.records import flag, from_json, to_json
from formats.sizes import Sizes, sizes_of
from formats.strict_json import canonical, parse_object

MANIFEST_NAME = "manifest.json"
CARD_NAME = "README.md"  # a page for people, who edit it: no reader checks it
EVALUATION_NAME = "evaluation.json"  # what int4-eval found, if somebody asked it to; not listed
INDEX_NAME = "model.safetensors.index.i4.json"
SHARD_SUFFIX = ".i4" + SUFFIX
FORMAT_VERSION = 1
QUANT_METHOD = "i4"  # as config.json calls the format
SHARD_METADATA = {"format": "pt", "i4.format_version": str(FORMAT_VERSION)}  # of every shard
SHA256 = re.compile("[0-9a-f]{64}")
STACKS, TRANSPOSED = "stacks", "transposed"
FEATURES = frozenset({STACKS, TRANSPOSED})  # what a `requires` entry may name in this version


@dataclass(frozen=True)
class FileRecord:
    """One file: its name inside the folder, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights came from: Hub id or folder name, commit (null for a folder), and its weight files."""

    id: str
    revision: str | None
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class CalibrationRecord:
    """What a calibrated method saw: the digest of a text, and how many windows of `seq_len` tokens `seed` drew."""

    sha256: str
    windows: int
    seq_len: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """Every option that changes a byte of the output."""

    converter: str
    method: str
    group_size: int
    symmetric: bool
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    calibration: CalibrationRecord | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme of the quantised tensors."""
        return Scheme(self.group_size, self.symmetric)

    @property
    def summary(self) -> str:
        """Method, scheme and groups, in words."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        group = "one group a row" if self.group_size == ROW_WISE else f"groups of {self.group_size}"
        return f"{self.method}, {kind}, {group}"


@dataclass(frozen=True)
class ErrorRecord:
    """How far the int4 matrix is from its source.

    ‖W − Ŵ‖² / ‖W‖², the cosine of the angle between W and Ŵ, and the share of weights beyond the outermost codes; of
    a calibrated matrix ‖(W − Ŵ) Xᵀ‖² / ‖W Xᵀ‖² for the inputs X that it was given.
    """

    relative_mse: float
    cosine: float
    clipped: float
    output: float | None = None


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the source: quantised or kept, and why; `sha256` has a digest for each of its stored tensors.

    What is `transposed` has its input features first in the source, [K, N] or [E, K, N], and is turned as it is stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    quantized: bool
    reason: str
    file: str
    sha256: tuple[str, ...]
    error: ErrorRecord | None
    transposed: bool = flag()

    @property
    def spec(self) -> TensorSpec:
        """Type and shape in the source."""
        return TensorSpec(self.dtype, self.shape)

    @property
    def matrix(self) -> TensorSpec:
        """Type and shape with rows of output features: [N, K], or [E, N, K] of a stack."""
        return self.spec.turned if self.transposed else self.spec

    @property
    def features(self) -> frozenset[str]:
        """What a reader of this row must know beside the matrix [N, K]."""
        needed = {STACKS: self.quantized and len(self.shape) > 2, TRANSPOSED: self.transposed}
        return frozenset(feature for feature, is_needed in needed.items() if is_needed)

    def stored(self, scheme: Scheme) -> dict[str, TensorSpec]:
        """The tensors on disk that stand for this one."""
        return stored_tensors(self.name, self.matrix, scheme if self.quantized else None)


@dataclass(frozen=True)
class Manifest:
    """The whole record; `digest` is the SHA-256 of its canonical JSON with an empty `digest`."""

    format_version: int
    requires: tuple[str, ...]
    source: SourceRecord
    recipe: Recipe
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    digest: str = ""

    def sealed(self) -> "Manifest":
        """This manifest with its digest filled in."""
        bare = replace(self, digest="")
        return replace(bare, digest=hashlib.sha256(canonical(to_json(bare))).hexdigest())

    def to_bytes(self) -> bytes:
        """The canonical text of the sealed manifest."""
        return canonical(to_json(self.sealed()))

    @property
    def sizes(self) -> Sizes:
        """Counts and sizes of the tensors."""
        return sizes_of((row.spec, row.quantized, row.stored(self.recipe.scheme)) for row in self.tensors)

    @property
    def kept(self) -> dict[str, list[str]]:
        """The tensors that were kept, by the reason, the commonest first."""
        rows = [row for row in self.tensors if not row.quantized]
        reasons = Counter(row.reason for row in rows).most_common()
        return {reason: [row.name for row in rows if row.reason == reason] for reason, _ in reasons}

    @property
    def worst_first(self) -> list[tuple[str, ErrorRecord]]:
        """The quantised tensors and their errors.

        By the error of the outputs where calibration measured it, because the weights' own says little then.
        """
        rows = [(row.name, row.error) for row in self.tensors if row.error]
        return sorted(rows, key=lambda row: (row[1].output or 0.0, row[1].relative_mse), reverse=True)

    @property
    def shards(self) -> dict[str, dict[str, TensorSpec]]:
        """Shard name → the tensors that it stores, in the order of the rows."""
        shards: dict[str, dict[str, TensorSpec]] = {}
        for row in self.tensors:
            shards.setdefault(row.file, {}).update(row.stored(self.recipe.scheme))
        return shards


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """The entry of config.json that tells loaders without a manifest what the quantised tensors are."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bits": BITS,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
    }


def features_of(rows: Iterable[TensorRecord]) -> tuple[str, ...]:
    """What `requires` names for `rows`."""
    return tuple(sorted({feature for row in rows for feature in row.features}))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; raises `CheckpointError`."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: holds no {MANIFEST_NAME}; it is no int4 checkpoint, or its conversion did not finish: "
            "run int4-convert again"
        )
    raw = read_small(path, link_roots(folder))
    fields = parse_object(raw, str(path))
    _check_version(fields.get("format_version"), fields.get("requires"), path)
    manifest = from_json(Manifest, fields, str(path))
    if manifest.to_bytes() != raw:  # byte for byte: JSON can say the same in many ways
        raise CheckpointError(f"{path}: its digest does not match its text; it was changed or damaged: fetch it again")
    _check_digests(manifest, path)
    _check_rows(manifest, path)
    return manifest


def _check_version(version: object, requires: object, path: Path) -> None:
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format_version is {version!r}, expected a number from 1; fetch it again")
    names = {name for name in requires if isinstance(name, str)} if isinstance(requires, list) else set()
    unknown = sorted(names - FEATURES) if version == FORMAT_VERSION else []
    if version > FORMAT_VERSION or unknown:
        found = f"needs {unknown}" if unknown else f"is format version {version}"
        raise CheckpointError(f"{path}: {found}, this program reads version {FORMAT_VERSION}; upgrade int4-convert")


def _check_digests(manifest: Manifest, path: Path) -> None:
    files = [file.sha256 for file in manifest.files + manifest.source.files]
    for digest in files + [digest for row in manifest.tensors for digest in row.sha256]:
        if not SHA256.fullmatch(digest):
            raise CheckpointError(f"{path}: found {digest[:80]!r}, expected a SHA-256 in lower-case hex")


def _check_rows(manifest: Manifest, path: Path) -> None:
    """Every row must describe something that can exist: names, types, shapes and files that fit together."""
    files = {safe_name(file.name, str(path)) for file in manifest.files}
    if len(files) != len(manifest.files):
        raise CheckpointError(f"{path}: lists a file twice; convert the model again")
    try:
        scheme = manifest.recipe.scheme
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
    stored: set[str] = set()
    for row in manifest.tensors:
        where = f"{path}: tensor {row.name[:200]!r}"
        if not row.spec.is_possible:
            raise CheckpointError(f"{where}: is {row.dtype:.20} {list(row.shape)!r:.80}, which no file can hold")
        if row.quantized and (len(row.shape) not in (2, 3) or 0 in row.shape):
            raise CheckpointError(f"{where}: is quantized with shape {list(row.shape)}, expected a matrix or a stack")
        if row.transposed and not row.quantized:
            raise CheckpointError(f"{where}: is kept and transposed, expected it as it was; convert the model again")
        if missing := sorted(row.features - set(manifest.requires)):
            raise CheckpointError(f"{where}: needs {missing}, which requires does not name; convert the model again")
        if row.file not in files or not row.file.endswith(SHARD_SUFFIX):
            raise CheckpointError(f"{where}: stands in {row.file[:200]!r}, which is no shard of this checkpoint")
        names = set(row.stored(scheme))
        if len(row.sha256) != len(names):
            raise CheckpointError(f"{where}: has {len(row.sha256)} digests for {len(names)} stored tensors")
        if names & stored:
            raise CheckpointError(f"{where}: {sorted(names & stored)} are stored twice; convert the model again")
        stored |= names
