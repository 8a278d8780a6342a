"""Measure every sensible option of the Hopper kernels and write the table by which the runtime chooses.

Every time taken is kept in a file beside the table: a run that was cut off goes on where it stopped.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/tune.py TABLE.json [--tokens 1,16] [--activations bf16]
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from matmul import MAX_ERROR, SHAPES
from products import distance, exact_product, operands
from timing import copies_for, graph_time
from torch import Tensor

from formats.layout import Scheme, ceil_div
from runtime.activations import rounded_to_fp8
from runtime.kernels.hopper import KERNELS
from runtime.kernels.hopper_choice import FEW, PROCESSORS, SHARED_BYTES, SPLITS, Entry, entry_of
from runtime.kernels.hopper_prefill import fitting
from runtime.ops import FP8_TOKENS
from runtime.repack import arrange

LAYERS = ((4096, 4096), (6144, 4096), (28672, 4096), (3072, 2048), (16384, 2048))  # of Llamas with 8B and 1B, joined
TOKENS = (1, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
GROUP = 128
COMPILERS = 16
SWEEPS = 1000  # of the fit's descent

Candidate = tuple[str, dict[str, int]]
Size = tuple[int, int, int, str]  # tokens, rows, columns, activations


def candidates(tokens: int, rows: int, columns: int, activations: str = "bf16") -> Iterator[Candidate]:
    """Kernels with options that are worth a try."""
    if activations == "fp8":
        yield from _fp8()
        return
    if tokens <= 32:
        yield from _decode(tokens, rows, columns)
    if 16 < tokens <= 512:
        yield from _batch(tokens, rows, columns)
    if tokens > 32:
        yield from _prefill(tokens, rows, columns)


def _decode(tokens: int, rows: int, columns: int) -> Iterator[Candidate]:
    box = next(box for box in FEW if box >= tokens)
    shapes = [(16, 4, 2), (16, 8, 2), (32, 4, 2), (32, 8, 2), (64, 4, 2)]
    if box < 32:
        shapes += [(16, 8, 4) if box == 1 else (16, 4, 4), (32, 4, 4)]
    for height, warps, step in shapes:
        for splits in (1, 2):
            programs, steps = ceil_div(rows, height) * splits, ceil_div(columns // 64, warps * step * splits)
            slot = warps * step * (32 * height + height + 128 * box)
            for buffers in {min(steps, buffers) for buffers in (2, 3, 4)}:
                if programs >= 100 and (splits == 1 or programs <= 600) and buffers * slot < SHARED_BYTES // 2:
                    yield "decode", {"rows": height, "tokens": box, "warps": warps, "splits": splits, "step": step,
                                     "buffers": buffers}  # fmt: skip


def _width(tokens: int, most: int) -> int:
    return min(most, max(16, 1 << (tokens - 1).bit_length()))


def _batch(tokens: int, rows: int, columns: int) -> Iterator[Candidate]:
    for width in sorted({_width(tokens, 64), _width(tokens, 128)}):
        for warps in (4, 8):
            programs = ceil_div(rows, 16 * warps) * ceil_div(tokens, width)
            for step, buffers in {32: ((2, 4), (4, 3)), 64: ((2, 3), (4, 2))}.get(width, ((2, 3),)):
                for splits in SPLITS:
                    if 110 <= programs * splits <= 1100 and columns // 64 >= 2 * step * splits:
                        yield "batch", {"tokens": width, "warps": warps, "splits": splits, "raster": 8, "step": step,
                                        "buffers": buffers}  # fmt: skip


def _prefill(tokens: int, rows: int, columns: int) -> Iterator[Candidate]:
    widths = {_width(tokens, 64), _width(tokens, 128), _width(tokens, 256)}
    for width in widths if tokens < 1024 else (128, 256):
        for height, programs in ((128, 1), (256, 1), (128, 2)):
            if height * width > 128 * 256 or (width > 64 and programs == 2):
                continue
            tiles = ceil_div(rows, height) * ceil_div(tokens, width)
            for step in {256: (1,), 128: (1, 2)}.get(width, (2, 4)):
                buffers = fitting(16 // step // programs, height, width, step, GROUP, 1, programs)
                for splits in SPLITS:
                    last = tiles % (PROCESSORS * programs) * splits  # programs of the last round's tiles
                    if buffers < 2 or tiles * splits < 80 or (splits > 1 and (
                        not 0 < last <= 300 * programs or columns // 64 < 2 * step * splits
                    )):  # fmt: skip
                        continue
                    for raster in (4, 16) if tokens >= 1024 else (8,):
                        yield "prefill", {"rows": height, "tokens": width, "programs": programs, "splits": splits,
                                          "raster": raster, "step": step, "buffers": buffers}  # fmt: skip


def _fp8() -> Iterator[Candidate]:
    for raster in (4, 8, 16):
        yield "fp8", {"tokens": 256, "raster": raster, "buffers": 4}


@dataclass(frozen=True)
class Trial:
    """A kernel with options, and its microseconds, or None where its result was wrong."""

    kernel: str
    options: dict[str, int]
    us: float | None


def trials(size: Size, tried: Iterable[Candidate]) -> Iterator[Trial]:
    """Every candidate that is to be tried, checked and timed."""
    tokens, rows, columns, activations = size
    scheme = Scheme(GROUP)
    x, quantized, _ = operands(tokens, rows, columns, scheme, torch.bfloat16, "cuda")
    exact = exact_product(rounded_to_fp8(x) if activations == "fp8" else x, quantized, None, scheme)
    matrix = arrange(quantized)
    copies = [matrix.packed.clone() for _ in range(copies_for(matrix.packed.nbytes))]
    for kernel, options in tried:
        call = partial(KERNELS[kernel], x, scale=matrix.scale, zero=None, bias=None, group=GROUP, **options)
        right = distance(call(words=matrix.packed), exact) <= MAX_ERROR
        us = graph_time([partial(call, words=copy) for copy in copies]) if right else None
        yield Trial(kernel, options, us)


def compile_all(trials: Iterable[tuple[Size, Candidate]]) -> None:
    """Run everything once, in several processes: timings then find Triton's cache."""
    jobs = {(size, kernel, tuple(options.items())) for size, (kernel, options) in trials}
    order = sorted(jobs, key=lambda job: -job[0][1] * job[0][2])
    kinds = {job[1:]: job for job in order}  # the smallest matrix of a kind
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(run_once, kinds.values()))


def run_once(job: tuple[Size, str, tuple[tuple[str, int], ...]]) -> None:
    """One call of one candidate."""
    (tokens, rows, columns, _), kernel, options = job
    x, quantized, _ = operands(tokens, rows, columns, Scheme(GROUP), torch.bfloat16, "cuda")
    matrix = arrange(quantized)
    KERNELS[kernel](x, matrix.packed, matrix.scale, None, None, GROUP, **dict(options))


@click.command(help=__doc__)
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES + LAYERS), show_default=True, help="N x K.")
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True)
@click.option("--activations", default="bf16,fp8", show_default=True, help="fp8 only where there are tokens enough.")
def main(table: Path, shapes: str, tokens: str, activations: str) -> None:
    """Time what is not in the file of times, then write the table from all of it."""
    kinds, counts = activations.split(","), [int(count) for count in tokens.split(",")]
    matrices = [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]
    times = table.with_suffix(".times.jsonl")
    rows = [json.loads(line) for line in times.read_text().splitlines()] if times.exists() else []
    done = {json.dumps({**row, "us": None}) for row in rows}
    sizes = [(count, n, k, kind) for kind in kinds for n, k in matrices for count in counts
             if kind == "bf16" or count >= FP8_TOKENS]  # fmt: skip
    new = {size: [one for one in candidates(*size) if json.dumps(row_of(size, Trial(*one, None))) not in done]
           for size in sizes}  # fmt: skip
    compile_all((size, candidate) for size, tried in new.items() for candidate in tried)
    for size, tried in new.items():
        timed = [row_of(size, trial) for trial in trials(size, tried)] if tried else []
        with times.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in timed)
        rows += timed
        print(*size, fastest(row for row in rows if size_of(row) == size), flush=True)
    write(table, rows)


def row_of(size: Size, trial: Trial) -> dict[str, Any]:
    """A line of the file of times."""
    tokens, rows, columns, activations = size
    return {"activations": activations, "tokens": tokens, "rows": rows, "columns": columns, **vars(trial)}


def size_of(row: dict[str, Any]) -> Size:
    """What a line is for."""
    return row["tokens"], row["rows"], row["columns"], row["activations"]


def fastest(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of those that were right."""
    return min((row for row in rows if row["us"] is not None), key=lambda row: row["us"])


def write(table: Path, rows: list[dict[str, Any]]) -> None:
    """The table, an entry a line: the fastest choice of each size, and the microseconds that fit all of their kinds."""
    by_size = {size: [row for row in rows if size_of(row) == size] for size in sorted(set(map(size_of, rows)))}
    best = [fastest(tried) for tried in by_size.values()]
    kinds = {entry_of(row).choice.kind for row in best}
    timed = [(entry_of(row), row["us"]) for row in rows if row["us"] is not None]
    us = fitted([one for one in timed if one[0].choice.kind in kinds])
    lines = ",\n".join("  " + json.dumps({name: row[name] for name in row if name != "us"}) for row in best)
    costs = ",\n".join(f"  {json.dumps(name)}: {cost:.4f}" for name, cost in sorted(us.items()))
    device = json.dumps(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    table.write_text(f'{{"device": {device}, "us": {{\n{costs}\n}}, "entries": [\n{lines}\n]}}\n')


def fitted(timed: list[tuple[Entry, float]]) -> dict[str, float]:
    """Microseconds of each of `Choice.terms`, none below 0, of least squares of the relative errors."""
    counts = [entry.choice.terms(entry.size) for entry, _ in timed]
    names = sorted({name for terms in counts for name in terms})
    shares = [[terms.get(name, 0) / us for name in names] for terms, (_, us) in zip(counts, timed, strict=True)]
    a = torch.tensor(shares, dtype=torch.float64)
    return dict(zip(names, nonnegative(a, a.new_ones(len(a))).tolist(), strict=True))


def nonnegative(a: Tensor, b: Tensor) -> Tensor:
    """The x ≥ 0 [K] of least ‖a x − b‖, a [N, K], by coordinate descent."""
    square, right = a.T @ a, a.T @ b
    x = torch.zeros_like(right)
    for _ in range(SWEEPS):
        for i in square.diagonal().nonzero().flatten():
            x[i] = (x[i] + (right[i] - square[i] @ x) / square[i, i]).clamp(min=0)
    return x


if __name__ == "__main__":
    main()
