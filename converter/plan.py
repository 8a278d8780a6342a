"""What happens to each tensor, and why: decided before any work."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from converter.orientation import orientations
from converter.source import Source
from formats.container import MAX_NAME_BYTES
from formats.errors import CheckpointError, UsageError
from formats.layout import TensorSpec, stored_tensors
from formats.manifest import INDEX_NAME, MANIFEST_NAME, SHARD_SUFFIX, ErrorRecord, Recipe, TensorRecord
from formats.selection import kept_by_default, matches, never_quantized
from formats.sizes import Sizes, sizes_of

LINEAR, CONV1D, FUSED_EXPERTS = "linear layer", "Conv1D", "fused experts"
TURNED, UNKNOWN = ", stored [in, out]", ", stored [out, in] or [in, out]: neither shapes nor config.json tell"


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the source, and what becomes of it: `stored` are the tensors written for it.

    Those of one that is `transposed`, [K, N] or [E, K, N], are of its matrices turned.
    """

    name: str
    spec: TensorSpec
    quantized: bool
    transposed: bool
    reason: str
    stored: dict[str, TensorSpec]

    @property
    def matrix(self) -> TensorSpec:
        """Type and shape with rows of output features: [N, K], or [E, N, K] of a stack."""
        return self.spec.turned if self.transposed else self.spec

    def record(self, file: str, digests: Mapping[str, "hashlib._Hash"], error: ErrorRecord | None) -> TensorRecord:
        """Its row of the manifest, once it stands in `file` and all that is stored for it is in `digests`."""
        return TensorRecord(
            self.name, self.spec.dtype, self.spec.shape, self.quantized, self.reason, file,
            tuple(digest.hexdigest() for digest in digests.values()), error, self.transposed,
        )  # fmt: skip


@dataclass(frozen=True)
class ShardPlan:
    """One file to write, from one file of the source."""

    source: str
    output: str
    tensors: tuple[TensorPlan, ...]

    @property
    def stored(self) -> dict[str, TensorSpec]:
        """The tensors of the file."""
        return {name: spec for tensor in self.tensors for name, spec in tensor.stored.items()}


@dataclass(frozen=True)
class Plan:
    """The whole conversion."""

    recipe: Recipe
    shards: tuple[ShardPlan, ...]

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """All tensors, shard by shard."""
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def sizes(self) -> Sizes:
        """Counts and sizes of the tensors."""
        return sizes_of((tensor.spec, tensor.quantized, tensor.stored) for tensor in self.tensors)


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Decide for every tensor of `source`.

    Raises `UsageError` for a pattern that matches or changes nothing, `CheckpointError` where names would collide or
    nothing would be quantised.
    """
    everything = {name: spec for tensors in source.shards.values() for name, spec in tensors.items()}
    turned = orientations(everything, source.config)

    def decide(name: str, spec: TensorSpec) -> TensorPlan:
        if source.layout is not None:
            return _take_over(name, spec, source, recipe)
        return _decide(name, spec, turned.get(name, False), recipe)

    shards = tuple(
        ShardPlan(shard, output, tuple(decide(name, spec) for name, spec in tensors.items()))
        for (shard, tensors), output in zip(source.shards.items(), _output_names(len(source.shards)), strict=True)
    )
    plan = Plan(recipe, shards)
    _check_patterns(plan)
    _check_collisions(plan, source)
    if not plan.sizes.quantized:
        reasons = Counter(tensor.reason for tensor in plan.tensors).most_common()
        found = ", ".join(f"{count} × {reason}" for reason, count in reasons)
        raise CheckpointError(f"{source.folder}: holds nothing to quantise: {found or 'no tensors'}")
    return plan


def _decide(name: str, spec: TensorSpec, transposed: bool | None, recipe: Recipe) -> TensorPlan:
    include, exclude = _first_match(recipe.include, name), _first_match(recipe.exclude, name)
    kept = never_quantized(name, spec)
    if kept is None and transposed is None:
        kept = FUSED_EXPERTS + UNKNOWN
    if kept is None and exclude:
        kept = f"excluded by {exclude}"
    if kept is None and not include:
        kept = kept_by_default(name)
    if kept is not None:
        return TensorPlan(name, spec, False, False, kept, stored_tensors(name, spec, None))
    kind = FUSED_EXPERTS if len(spec.shape) == 3 else CONV1D if transposed else LINEAR
    reason = f"included by {include}" if include else kind + (TURNED if transposed else "")
    matrix = spec.turned if transposed else spec
    return TensorPlan(name, spec, True, bool(transposed), reason, stored_tensors(name, matrix, recipe.scheme))


def _take_over(name: str, spec: TensorSpec, source: Source, recipe: Recipe) -> TensorPlan:
    """What becomes of a tensor of a source that is in int4 already: it stays what it is."""
    if name in source.packed:
        reason, stored = source.packed[name].reason, stored_tensors(name, spec, recipe.scheme)
        return TensorPlan(name, spec, True, False, reason, stored)
    reason = never_quantized(name, spec) or kept_by_default(name) or "not int4 in the source"
    return TensorPlan(name, spec, False, False, reason, stored_tensors(name, spec, None))


def _first_match(patterns: Sequence[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if matches(pattern, name)), None)


def _check_patterns(plan: Plan) -> None:
    recipe = plan.recipe
    for pattern in recipe.include + recipe.exclude:
        hits = [tensor for tensor in plan.tensors if matches(pattern, tensor.name)]
        if not hits:
            raise UsageError(f"pattern {pattern!r}: matches no tensor; --dry-run lists their names")
        if pattern in recipe.include and not any(tensor.quantized for tensor in hits):
            reasons = sorted({tensor.reason for tensor in hits})
            raise UsageError(f"--include {pattern!r}: all that it matches is kept nevertheless ({'; '.join(reasons)})")


def _check_collisions(plan: Plan, source: Source) -> None:
    seen: set[str] = set()
    for tensor in plan.tensors:
        if taken := sorted(seen & tensor.stored.keys()):
            raise CheckpointError(
                f"{source.folder}: {tensor.name!r} would be stored as {taken}, a name that the source holds already; "
                "keep it with --exclude"
            )
        if longest := [name for name in tensor.stored if len(name.encode()) > MAX_NAME_BYTES]:
            raise CheckpointError(
                f"{source.folder}: {tensor.name!r} would be stored as {longest[0]!r}, a name of over {MAX_NAME_BYTES} "
                "bytes; keep it with --exclude"
            )
        seen.update(tensor.stored)
    needed = {MANIFEST_NAME, INDEX_NAME, *(shard.output for shard in plan.shards)}
    if taken := [name for name in source.side_files if name.partition("/")[0] in needed]:
        raise CheckpointError(f"{source.folder}: holds {taken}, names that the output needs; rename or remove them")


def _output_names(count: int) -> Iterator[str]:
    if count == 1:
        yield f"model{SHARD_SUFFIX}"
        return
    for i in range(1, count + 1):
        yield f"model-{i:05d}-of-{count:05d}{SHARD_SUFFIX}"
