"""What an inference engine would make of a plan: which of its kernels runs each matrix, and what to change."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from converter.engines import ENGINES, Engine, Kernel, Matrix
from converter.plan import Plan, TensorPlan
from formats.errors import some
from formats.interop.groups import can_split
from formats.layout import CODES_PER_WORD, ROW_WISE
from formats.selection import WEIGHT

# How tensor parallelism cuts a matrix [N, K], by the last part of its module's name: along K, not at all, else along N.
ROW_PARALLEL = frozenset({"o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "wo", "w2"})
REPLICATED = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
EXPERTS = ".experts."
SIZES = (32, 64, 128, 256)  # of groups, that engines know


@dataclass(frozen=True)
class Verdict:
    """Which kernel would run a matrix, None for none, and what is against that, if anything."""

    kernel: str | None
    problem: str | None = None

    @property
    def rank(self) -> int:
        """0 where all is well, 1 where it is slow, 2 where it does not run."""
        return 2 if self.kernel is None else int(self.problem is not None)

    def __str__(self) -> str:
        if self.kernel is None:
            return f"no kernel: {self.problem}"
        return self.kernel if self.problem is None else f"{self.kernel}, because {self.problem}"


@dataclass(frozen=True)
class Forecast:
    """The verdict on each quantised tensor, by name, and what to do, in sentences."""

    engine: str
    tensor_parallel: int
    verdicts: dict[str, Verdict]
    advice: tuple[str, ...]


def forecast(plan: Plan, target: str, tensor_parallel: int = 1) -> Forecast:
    """What the engine `target` of `ENGINES` would make of `plan` on so many GPUs."""
    engine = ENGINES[target]
    asked = plan.recipe.group_size
    found = verdicts(plan, engine, tensor_parallel, asked)
    advice = list(_halves(plan, engine))
    size = _best_size(plan, engine, tensor_parallel)
    better = verdicts(plan, engine, tensor_parallel, size)
    gain = f"; then {_summary(better)}" if size != asked else ""
    if engine.layout and _splits(plan, size):
        option = f" --group-size {size}" if gain else ""
        advice.append(f"int4-export OUT_DIR EXPORT --to {engine.layout}{option}: the same weights for it{gain}")
    elif gain:
        advice.append(f"convert with --group-size {size}{gain}")
    if stuck := [name for name, verdict in better.items() if verdict.kernel is None]:
        advice.append(f"keep {some(stuck)} by --exclude, or take fewer GPUs: no group size helps")
    return Forecast(engine.name, tensor_parallel, found, tuple(advice))


def verdicts(plan: Plan, engine: Engine, tensor_parallel: int, group: int) -> dict[str, Verdict]:
    """The verdict on each quantised tensor, were its groups of `group` columns."""
    rows = Counter[str]()  # of all that is fused with a tensor
    for tensor in plan.tensors:
        if tensor.quantized:
            rows[_fused(tensor.name)] += tensor.matrix.shape[-2]
    return {
        tensor.name: _verdict(tensor, plan, engine, tensor_parallel, group, rows[_fused(tensor.name)])
        for tensor in plan.tensors
        if tensor.quantized
    }


def _verdict(tensor: TensorPlan, plan: Plan, engine: Engine, gpus: int, group: int, fused_rows: int) -> Verdict:
    leaf = _parts(tensor.name)[1]
    *_, rows, columns = tensor.matrix.shape
    by_columns = gpus > 1 and leaf in ROW_PARALLEL
    by_rows = gpus > 1 and not by_columns and leaf not in REPLICATED
    if by_columns and group == ROW_WISE and not engine.splits_whole_rows:
        return Verdict(None, "the scale of a whole row cannot be split with its columns")
    cut, size = ("columns", columns) if by_columns else ("rows", rows)
    if (by_columns or by_rows) and size % gpus:
        return Verdict(None, f"{size} {cut} do not divide by {gpus} GPUs")
    if by_rows and not plan.recipe.symmetric and rows // gpus % CODES_PER_WORD:
        return Verdict(None, f"{rows // gpus} rows on each GPU share words of zero points, which {CODES_PER_WORD} have")
    if by_columns:
        columns //= gpus
    step, of = (CODES_PER_WORD, "a packed word's") if group == ROW_WISE else (group, "the group size,")
    if columns % step and (by_columns or engine.layout):
        each = " on each GPU" if by_columns else ""
        return Verdict(None, f"{columns} columns{each} are no multiple of {of} {step}")
    rows = fused_rows // gpus if by_rows else fused_rows
    matrix = Matrix(rows, columns, group, plan.recipe.symmetric, tensor.spec.dtype)
    return _choice(engine.experts if EXPERTS in tensor.name else engine.linear, matrix)


def _choice(kernels: tuple[Kernel, ...], matrix: Matrix) -> Verdict:
    """The first kernel that takes `matrix` on any machine, behind those that take it on some."""
    taken: list[str] = []
    refusals: list[str] = []
    for kernel in kernels:
        refusal = kernel.refusal(matrix)
        if refusal is None and kernel.needs:
            taken.append(str(kernel))
        elif refusal is None:
            return Verdict(", else ".join([*taken, str(kernel)]), refusals[-1] if kernel.slow and refusals else None)
        elif not kernel.slow and not kernel.needs:
            refusals.append(refusal)
    return Verdict(", else ".join(taken) or None, refusals[-1] if refusals else None)


def _parts(name: str) -> tuple[str, str]:
    """The path of the module that holds a tensor's, and the latter's own name."""
    parent, _, leaf = name.removesuffix(WEIGHT).rpartition(".")
    return parent, leaf


def _fused(name: str) -> str:
    """A name for all that is fused with the tensor `name`."""
    parent, leaf = _parts(name)
    return f"{parent}.{next((family[0] for family in FUSED if leaf in family), leaf)}"


def _halves(plan: Plan, engine: Engine) -> Iterator[str]:
    """A sentence for siblings of which some are quantised and some are not: loading stops at them."""
    families: dict[str, dict[str, bool]] = {}
    for tensor in plan.tensors if engine.fuses else ():
        leaf = _parts(tensor.name)[1]
        if tensor.name.endswith(WEIGHT) and any(leaf in family for family in FUSED):
            families.setdefault(_fused(tensor.name), {})[leaf] = tensor.quantized
    where: dict[tuple[str, str], list[str]] = {}
    for name, quantized in families.items():
        int4 = " and ".join(leaf for leaf in sorted(quantized) if quantized[leaf])
        kept = " and ".join(leaf for leaf in sorted(quantized) if not quantized[leaf])
        if int4 and kept:
            where.setdefault((int4, kept), []).append(name.rpartition(".")[0])
    for (int4, kept), parents in where.items():
        yield (
            f"quantise {int4} and {kept} of {some(parents)} alike, by --include or --exclude: {int4} would be int4 and "
            f"{kept} not, and {engine.name} would not load them (“Detected some but not all shards … are quantized”, "
            "“Found a different quantization schemes”)"
        )


def _splits(plan: Plan, size: int) -> bool:
    """Whether the groups of `plan` can be cut into ones of `size`, or are of it."""
    matrices = [tensor.matrix for tensor in plan.tensors if tensor.quantized]
    return all(can_split(matrix.shape[-1], plan.recipe.scheme, size) for matrix in matrices)


def _best_size(plan: Plan, engine: Engine, gpus: int) -> int:
    """The group size with which most runs, and well: as asked for, else by splitting, else the largest."""
    asked = plan.recipe.group_size

    def cost(size: int) -> tuple[int, int, bool, bool, int]:
        ranks = Counter(verdict.rank for verdict in verdicts(plan, engine, gpus, size).values())
        return ranks[2], ranks[1], size != asked, not _splits(plan, size), -size

    return min({asked, *SIZES}, key=cost)


def _summary(found: dict[str, Verdict]) -> str:
    return "; ".join(f"{text} ({count} tensors)" for text, count in Counter(map(str, found.values())).most_common())
