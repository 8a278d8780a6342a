"""Which Hopper kernel takes a call, and with which options: by a table of measured sizes, and estimates between them.

`hopper_h200.json`, written by tests/bench/tune.py, has the fastest choices of a few sizes, and how long a block of
columns takes them when their programs fill the GPU. For any other size that tells how long they would take: the time
of a block, times the blocks, times the rounds in which so many programs run. Decode takes what its bytes take, or, with
few programs, what it has to wait for them.
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
SPLITS = (1, 2, 3, 4, 6, 8)
LAUNCH_US, SUM_US, SUM_BYTES_PER_US = 2.5, 1.5, 4e6  # besides the rounds; to add up split tiles, and by their bytes
WORD_BYTES_PER_US, TOKEN_BYTES_PER_US = 4.4e6, 7.9e6  # decode's, from memory and from the cache
WAIT_US, DECODE_SUM_US = 2.4, 0.5  # from asking for a step of decode to its end; the small sums of its parts


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
    def programs(self) -> int:
        """How many programs make a round: as many as the GPU runs at once."""
        if self.kernel == "batch":
            rows, tokens = self.tile
            slot = self.step_blocks * (128 * tokens + 34 * rows)
            return PROCESSORS * max(1, SHARED_BYTES // (self.options["buffers"] * slot))
        return PROCESSORS * self.options.get("programs", 1)

    def with_splits(self) -> Iterator["Choice"]:
        """This choice with every number of splits."""
        if "splits" not in self.options:
            yield self
            return
        for splits in SPLITS:
            yield replace(self, options={**self.options, "splits": splits})

    def takes(self, size: Size) -> bool:
        """Whether it can run the size, with a step at least for every part of K."""
        enough = self.splits == 1 or size.columns >= BLOCK_COLUMNS * self.splits * self.step_blocks
        return enough and (self.kernel != "decode" or size.tokens <= self.options["tokens"])

    def estimate(self, size: Size, block_us: float | None) -> float:
        """Microseconds that the size takes, at `block_us` a round and block of columns."""
        rows, tokens = self.tile
        blocks = ceil_div(size.columns, BLOCK_COLUMNS)
        tiles = ceil_div(size.rows, rows) * ceil_div(size.tokens, tokens)
        if block_us is None:
            came = tiles * blocks * (32 * rows / WORD_BYTES_PER_US + 128 * tokens / TOKEN_BYTES_PER_US)
            waited = ceil_div(blocks, self.step_blocks * self.splits) * WAIT_US / self.options["buffers"]
            return LAUNCH_US + max(came, waited) + (DECODE_SUM_US if self.splits > 1 else 0)
        whole = tiles // self.programs if self.kernel == "prefill" else 0  # rounds of tiles that prefill does not split
        parts = (tiles - whole * self.programs) * self.splits
        rounds = whole + ceil_div(parts, self.programs) / self.splits
        us = LAUNCH_US + rounds * ceil_div(blocks, self.step_blocks) * self.step_blocks * block_us
        if parts and self.splits > 1:
            us += SUM_US + 8 * parts * rows * tokens / SUM_BYTES_PER_US
        return us


@dataclass(frozen=True)
class Entry:
    """The fastest choice for a size, and microseconds of a block of columns in each of its rounds; decode has none."""

    size: Size
    choice: Choice
    block_us: float | None


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
    entries = [entry for entry in table() if entry.size.activations == size.activations]
    measured = [entry.choice for entry in entries if entry.size == size]
    if measured:
        return measured[0]
    choices = [(choice, entry.block_us) for entry in entries for choice in entry.choice.with_splits()]
    return min((one for one in choices if one[0].takes(size)), key=lambda one: one[0].estimate(size, one[1]))[0]


@cache
def table() -> tuple[Entry, ...]:
    """The measured entries."""
    raw = json.loads((files("runtime.kernels") / TABLE_NAME).read_text())
    return tuple(
        Entry(
            Size(row["activations"], row["tokens"], row["rows"], row["columns"]),
            Choice(row["kernel"], row["options"]),
            row["block_us"],
        )
        for row in raw["entries"]
    )
