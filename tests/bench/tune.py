"""Measure every sensible option of the Hopper kernels and write the fastest as the table that the runtime ships.

With what a block of columns takes each of them, the old ones too, for the estimates of `runtime.kernels.hopper_choice`.

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

from formats.layout import Scheme, ceil_div
from runtime.activations import rounded_to_fp8
from runtime.kernels.hopper import KERNELS
from runtime.kernels.hopper_choice import BLOCK_COLUMNS, FEW, LAUNCH_US, PROCESSORS, SHARED_BYTES, Choice
from runtime.kernels.hopper_prefill import fitting
from runtime.ops import FP8_TOKENS
from runtime.repack import arrange

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 128
COMPILERS = 16
ROUND_COLUMNS = 8192  # of the matrix that tells the time of a block
SPLITS = (1, 2, 3, 4, 8)

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
                    parts = tiles * splits
                    if buffers < 2 or parts < 80 or (splits > 1 and (
                        tiles % PROCESSORS == 0 or parts > 300 * programs or columns // 64 < 2 * step * splits
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


def trials(tokens: int, rows: int, columns: int, activations: str = "bf16") -> Iterator[Trial]:
    """Every candidate, checked and timed."""
    scheme = Scheme(GROUP)
    x, quantized, _ = operands(tokens, rows, columns, scheme, torch.bfloat16, "cuda")
    exact = exact_product(rounded_to_fp8(x) if activations == "fp8" else x, quantized, None, scheme)
    matrix = arrange(quantized)
    copies = [matrix.packed.clone() for _ in range(copies_for(matrix.packed.nbytes))]
    for kernel, options in candidates(tokens, rows, columns, activations):
        call = partial(KERNELS[kernel], x, scale=matrix.scale, zero=None, bias=None, group=GROUP, **options)
        right = distance(call(words=matrix.packed), exact) <= MAX_ERROR
        us = graph_time([partial(call, words=copy) for copy in copies]) if right else None
        yield Trial(kernel, options, us)


def fastest(tried: Iterable[Trial]) -> Trial:
    """The fastest whose result was right."""
    return min((trial for trial in tried if trial.us is not None), key=lambda trial: trial.us or 0)


def best(tokens: int, rows: int, columns: int, activations: str) -> dict[str, Any]:
    """The fastest candidate, as an entry of the table."""
    found = fastest(trials(tokens, rows, columns, activations))
    size = f"{rows:>6}x{columns:<6} {tokens:>5} {activations}"
    print(f"{size} {found.us:>8.1f} us  {found.kernel} {found.options}", flush=True)
    return {"activations": activations, "tokens": tokens, "rows": rows, "columns": columns, "kernel": found.kernel,
            "options": found.options}  # fmt: skip


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


def full(choice: Choice) -> tuple[Size, Candidate]:
    """A size that fills a round of programs, and the choice without splits."""
    rows, tokens = choice.tile
    size = tokens, choice.programs * rows, ROUND_COLUMNS, "fp8" if choice.kernel == "fp8" else "bf16"
    return size, (choice.kernel, {name: 1 if name == "splits" else value for name, value in choice.options.items()})


def block_us(choice: Choice) -> float:
    """Microseconds of a block of columns in a round."""
    (tokens, rows, columns, _), (kernel, options) = full(choice)
    x, quantized, _ = operands(tokens, rows, columns, Scheme(GROUP), torch.bfloat16, "cuda")
    matrix = arrange(quantized)
    copies = [matrix.packed.clone() for _ in range(copies_for(matrix.packed.nbytes))]
    call = partial(KERNELS[kernel], x, scale=matrix.scale, zero=None, bias=None, group=GROUP, **options)
    return (graph_time([partial(call, words=copy) for copy in copies]) - LAUNCH_US) * BLOCK_COLUMNS / columns


@click.command(help=__doc__)
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), show_default=True, help="N x K.")
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True, help='"" measures the blocks alone.')
@click.option("--activations", default="bf16,fp8", show_default=True, help="fp8 only where there are tokens enough.")
def main(table: Path, shapes: str, tokens: str, activations: str) -> None:
    """Write the table, size by size; entries for other sizes stay."""
    kinds, counts = activations.split(","), [int(count) for count in tokens.split(",") if count]
    matrices = [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]
    sizes = [(count, rows, columns, kind) for kind in kinds for rows, columns in matrices for count in counts
             if kind == "bf16" or count >= FP8_TOKENS]  # fmt: skip
    entries = json.loads(table.read_text())["entries"] if table.exists() else []
    compile_all((size, candidate) for size in sizes for candidate in candidates(*size))
    for size in sizes:
        found = best(*size)
        entries = [entry for entry in entries if size_of(entry) != size] + [found]
        write(table, entries)
    choices = {kind_of(entry): Choice(entry["kernel"], entry["options"]) for entry in entries}
    choices = {kind: choice for kind, choice in choices.items() if choice.kernel != "decode"}
    compile_all(map(full, choices.values()))
    times = {kind: round(block_us(choice), 4) for kind, choice in choices.items()}
    write(table, [{**entry, "block_us": times.get(kind_of(entry))} for entry in entries])


def write(table: Path, entries: list[dict[str, Any]]) -> None:
    """The table, an entry a line."""
    lines = ",\n".join("  " + json.dumps(entry) for entry in sorted(entries, key=size_of))
    table.write_text(f'{{"device": "{torch.cuda.get_device_name()}", "entries": [\n{lines}\n]}}\n')


def kind_of(entry: dict[str, Any]) -> str:
    """What entries have in common that differ in splits at most."""
    return json.dumps([entry["kernel"], {**entry["options"], "splits": 1}])


def size_of(entry: dict[str, Any]) -> Size:
    """What an entry is for."""
    return entry["tokens"], entry["rows"], entry["columns"], entry["activations"]


if __name__ == "__main__":
    main()
