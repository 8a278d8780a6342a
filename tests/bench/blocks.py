"""Sizes of blocks against time: every option of the kernels on a few matrices, a table each, the fastest first.

Kernels: those of tune.py for Hopper, the portable ones, and the converter's; each result is checked before its time is
printed.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/blocks.py [--shapes 14336x4096] [--tokens 1,64] [--json FILE]
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import tables
import torch
from limits import int4_bytes, operations
from matmul import MAX_ERROR
from products import operands, relative_error
from quantize import cold, moved, random_weight, same
from timing import copies_for, graph_time
from torch import Tensor
from tune import GROUP, Candidate, Trial, candidates, compile_all, trials

from converter.quantize import kernels
from formats import codec
from formats.codec import Quantized
from formats.layout import Scheme
from runtime.kernels.matmul import matmul
from runtime.kernels.splitk import splitk
from runtime.ops import SPLIT_K_BELOW

PORTABLE: dict[str, Callable[..., Tensor]] = {"matmul": matmul, "splitk": splitk}
KINDS = ("hopper", "portable", "quantize")
COLUMNS = {"us": 9, "best %": 6, "TFLOP/s": 7, "GB/s": 6}


@dataclass(frozen=True)
class Table:
    """What was tried on one matrix, the fastest first; `m` is 0 where it was quantised."""

    n: int
    k: int
    m: int
    group: int
    nbytes: int
    tried: tuple[Trial, ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        """A row a trial, for programs."""
        size = {"n": self.n, "k": self.k, "m": self.m, "group": self.group}
        return [{**size, **asdict(trial), "us": trial.us and round(trial.us, 2)} for trial in self.tried]

    def lines(self) -> Iterator[str]:
        """For people."""
        work = f"M = {self.m}" if self.m else "quantised"
        yield f"\n{self.n}x{self.k}, {work}, G = {self.group}"
        yield tables.line(COLUMNS)
        best = self.tried[0].us
        for trial in self.tried:
            cells: list[object] = ["WRONG", "", "", ""]
            if trial.us and best:
                rate = f"{operations(self.m, self.n, self.k) / trial.us / 1e6:.0f}" if self.m else ""
                cells = [f"{trial.us:.1f}", f"{100 * best / trial.us:.0f}", rate, f"{self.nbytes / trial.us / 1e3:.0f}"]
            options = ", ".join(f"{name} {value}" for name, value in trial.options.items())
            yield f"{tables.line(COLUMNS, cells)}  {trial.kernel}: {options}"


def table(n: int, k: int, m: int, group: int, nbytes: int, tried: Iterable[Trial]) -> Table:
    """A table, with wrong results last."""
    return Table(n, k, m, group, nbytes, tuple(sorted(tried, key=lambda trial: trial.us or float("inf"))))


def portable_candidates(tokens: int) -> Iterator[Candidate]:
    """Blocks of the portable kernel that takes so many tokens."""
    if tokens < SPLIT_K_BELOW:
        for rows in (32, 64, 128):
            yield "splitk", {"block_n": rows}
    else:
        for rows in (32, 64, 128):
            for width in (64, 128) if tokens > 64 else (64,):
                yield "matmul", {"block_n": rows, "max_block_m": width}


def portable_trials(m: int, n: int, k: int) -> Iterator[Trial]:
    """Every candidate, checked and timed."""
    scheme = Scheme(GROUP)
    x, quantized, _ = operands(m, n, k, scheme, torch.bfloat16, "cuda")
    copies = [Quantized(quantized.packed.clone(), quantized.scale, None) for _ in range(copies_for(n * k // 2))]
    for kernel, options in portable_candidates(m):
        calls = [partial(PORTABLE[kernel], x, copy, None, scheme, **options) for copy in copies]
        right = relative_error(calls[0](), x, quantized, None, scheme) <= MAX_ERROR
        yield Trial(kernel, options, graph_time(calls) if right else None)


def quantize_candidates() -> Iterator[Candidate]:
    """Tiles of the converter's kernel."""
    for words in (128, 256, 512, 1024):
        for warps in (4, 8):
            yield "absmax", {"tile_words": words, "warps": warps}


def quantize_trials(weight: Tensor, scheme: Scheme) -> Iterator[Trial]:
    """Every candidate, checked and timed."""
    expected = codec.quantize(weight, scheme, torch.bfloat16)
    for kernel, options in quantize_candidates():
        launch = partial(kernels.launch, scheme=scheme, scale_dtype=torch.bfloat16, **options)
        found, _ = launch(weight)
        yield Trial(kernel, options, cold(launch, weight) if same(found, expected) else None)


def measure(kinds: Collection[str], shapes: list[tuple[int, int]], tokens: list[int]) -> Iterator[Table]:
    """Every table of the kinds of kernels that are asked for."""
    if "hopper" in kinds:
        sizes = [(m, n, k, "bf16") for n, k in shapes for m in tokens]
        compile_all((size, candidate) for size in sizes for candidate in candidates(*size))
    for n, k in shapes:
        for m in tokens:
            nbytes = int4_bytes(m, n, k, GROUP)
            if "hopper" in kinds:
                yield table(n, k, m, GROUP, nbytes, trials((m, n, k, "bf16"), candidates(m, n, k)))
            if "portable" in kinds:
                yield table(n, k, m, GROUP, nbytes, portable_trials(m, n, k))
        if "quantize" in kinds:
            weight = random_weight(n, k, "cuda")
            for group in (GROUP, -1):
                nbytes = moved(weight, *codec.quantize(weight, Scheme(group), torch.bfloat16).tensors())
                yield table(n, k, 0, group, nbytes, quantize_trials(weight, Scheme(group)))


@click.command(help=__doc__)
@click.option("--shapes", default="8192x2048,14336x4096", show_default=True)
@click.option("--tokens", default="1,64,2048", show_default=True)
@click.option("--kernels", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
def main(shapes: str, tokens: str, kinds: tuple[str, ...], json_file: Path | None) -> None:
    """Print the tables; exit with 1 if a result is wrong."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    sizes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in shapes.split(","))]
    found = []
    for one in measure(kinds, sizes, [int(m) for m in tokens.split(",")]):
        if one.tried:  # some sizes have no candidates
            found.append(one)
            print("\n".join(one.lines()), flush=True)
    tables.write(json_file, (record for one in found for record in one.records))
    sys.exit(any(trial.us is None for one in found for trial in one.tried))


if __name__ == "__main__":
    main()
