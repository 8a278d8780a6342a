"""Which Hopper kernel takes a call, and with which options: by a table of measured sizes, and estimates between them.

`hopper_h200.json`, written by tests/bench/tune.py, has the fastest choices of the measured sizes, and microseconds by
which to estimate any other: an estimate is a sum of `terms`, each so many times what the table has for its name. Those
were fitted to every time that the tuner took.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from formats.layout import ceil_div

TABLE_NAME = "hopper_h200.json"
BLOCK_COLUMNS = 64
PROCESSORS, SHARED_BYTES = 132, 227 << 10  # of the GPU that the table was measured on
FEW = (1, 8, 16, 32)  # tokens that decode has kernels for
SPLITS = (1, 2, 3, 4, 8)
DECODE_SPLITS, DECODE_WARPS = (1, 2), 32  # warps whose registers a processor has


@dataclass(frozen=True)
class Size:
    """x [tokens, columns] in `activations` × a matrix [rows, columns]."""

    activations: str
    tokens: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Choice:
    """A kernel with its options."""

    kernel: str
    options: dict[str, int]

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and tokens of a program's tile."""
        rows = {"batch": 16 * self.options.get("warps", 0), "fp8": 128}.get(self.kernel) or self.options["rows"]
        return rows, self.options["tokens"]

    @property
    def splits(self) -> int:
        """How many parts of K are added up at the end."""
        return self.options.get("splits", 1)

    @property
    def step_blocks(self) -> int:
        """Blocks of columns that a program takes at a time."""
        return self.options.get("step", 2) * (self.options["warps"] if self.kernel == "decode" else 1)

    @property
    def kind(self) -> str:
        """What choices have in common that differ in nothing but the parts of K and the order of tiles."""
        options = (f"{name}={value}" for name, value in self.options.items() if name not in ("splits", "raster"))
        return " ".join((self.kernel, *options))

    @property
    def programs(self) -> int:
        """How many programs a processor runs at once."""
        if self.kernel not in ("decode", "batch"):
            return self.options.get("programs", 1)
        rows, tokens = self.tile
        slot = self.step_blocks * (128 * tokens + 34 * rows)
        fit = max(1, SHARED_BYTES // (self.options["buffers"] * slot))
        return min(fit, DECODE_WARPS // self.options["warps"]) if self.kernel == "decode" else fit

    def with_splits(self) -> Iterator["Choice"]:
        """This choice with every number of splits."""
        if "splits" not in self.options:
            yield self
            return
        for splits in DECODE_SPLITS if self.kernel == "decode" else SPLITS:
            yield replace(self, options={**self.options, "splits": splits})

    def takes(self, size: Size) -> bool:
        """Whether it can run the size, with a step at least for every part of K; decode with no wait for each step."""
        steps = size.columns // (BLOCK_COLUMNS * self.step_blocks * self.splits)
        if self.splits > 1 and not steps:
            return False
        fits = size.tokens <= self.options["tokens"] and min(steps, 2) <= self.options["buffers"]
        return fits or self.kernel != "decode"

    def terms(self, size: Size) -> dict[str, float]:
        """How often each of the table's microseconds is in the time of a size.

        Programs run in rounds, as many at once as the GPU holds. A step of a round takes what its kind has to wait for
        it, and what it keeps a processor busy for each program there. Prefill splits only the tiles of its last round.
        """
        rows, tokens = self.tile
        steps = ceil_div(ceil_div(size.columns, BLOCK_COLUMNS), self.step_blocks)
        tiles = ceil_div(size.rows, rows) * ceil_div(size.tokens, tokens)
        at_once = PROCESSORS * self.programs
        whole = tiles // at_once if self.kernel == "prefill" else 0
        parts = (tiles - whole * at_once) * self.splits
        part_steps = ceil_div(steps, self.splits)
        full, rest = divmod(parts, at_once)
        last = ceil_div(rest, PROCESSORS)
        waits = whole * steps + (full + (rest > 0)) * part_steps
        busy = self.programs * (whole * steps + full * part_steps) + last * part_steps
        terms = {f"{self.kernel} start": 1.0, f"{self.kernel} round": whole + full + (rest > 0) - 1,
                 f"{self.kind} wait": waits, f"{self.kind} busy": busy}  # fmt: skip
        if parts and self.splits > 1:
            terms[f"{self.kernel} split"] = self.splits
            terms["MiB to add up"] = parts * rows * tokens / (1 << 18)
        return terms


@dataclass(frozen=True)
class Entry:
    """The fastest choice for a size."""

    size: Size
    choice: Choice


@dataclass(frozen=True)
class Table:
    """What was measured: choices for sizes, and the microseconds of `Choice.terms`."""

    entries: tuple[Entry, ...]
    us: dict[str, float]

    def estimate(self, size: Size, choice: Choice) -> float:
        """Microseconds that the choice takes for the size."""
        return sum(count * self.us[name] for name, count in choice.terms(size).items())


def choose(tokens: int, rows: int, columns: int, activations: str = "bf16") -> tuple[str, dict[str, Any]]:
    """Kernel and options for x [tokens, columns] and a matrix [rows, columns]."""
    choice = _choose(Size(activations, bucket(tokens), rows, columns))
    return choice.kernel, choice.options


def bucket(tokens: int) -> int:
    """`tokens` rounded up to what shares a choice, because each is a kernel to compile: few, 2ⁿ or 1.5 · 2ⁿ."""
    if tokens <= FEW[-1]:
        return next(few for few in FEW if few >= tokens)
    power = 1 << (tokens - 1).bit_length()
    return power * 3 // 4 if 4 * tokens <= 3 * power else power


@lru_cache(maxsize=4096)
def _choose(size: Size) -> Choice:
    """The table's, or else the one of the least estimate."""
    measured = table()
    entries = [entry for entry in measured.entries if entry.size.activations == size.activations]
    same = [entry.choice for entry in entries if entry.size == size]
    if same:
        return same[0]
    choices = (choice for entry in entries for choice in entry.choice.with_splits())
    different = {(one.kernel, *one.options.items()): one for one in choices}.values()  # many sizes share theirs
    return min((one for one in different if one.takes(size)), key=lambda one: measured.estimate(size, one))


@cache
def table() -> Table:
    """The shipped table."""
    raw = json.loads((files("runtime.kernels") / TABLE_NAME).read_text())
    return Table(tuple(map(entry_of, raw["entries"])), raw["us"])


def entry_of(row: dict[str, Any]) -> Entry:
    """A row of the file."""
    size = Size(row["activations"], row["tokens"], row["rows"], row["columns"])
    return Entry(size, Choice(row["kernel"], row["options"]))
