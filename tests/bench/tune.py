"""Measure every sensible option of the Hopper kernels and write the fastest as the table that the runtime ships.

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
from runtime.kernels.hopper_prefill import SHARED_BYTES, fitting
from runtime.ops import FP8_TOKENS
from runtime.repack import arrange

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 128
PROCESSORS = 132
COMPILERS = 16
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
    box = next(box for box in (1, 8, 16, 32) if box >= tokens)
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


def compile_all(sizes: Iterable[Size]) -> None:
    """Run every candidate once, in several processes: timings then find Triton's cache."""
    jobs = {(size, kernel, tuple(options.items())) for size in sizes for kernel, options in candidates(*size)}
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
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True)
@click.option("--activations", default="bf16,fp8", show_default=True, help="fp8 only where there are tokens enough.")
def main(table: Path, tokens: str, activations: str) -> None:
    """Write the table, size by size; entries for other sizes stay."""
    kinds, counts = activations.split(","), [int(count) for count in tokens.split(",")]
    sizes = [(count, *shape, kind) for kind in kinds for shape in SHAPES for count in counts
             if kind == "bf16" or count >= FP8_TOKENS]  # fmt: skip
    entries = json.loads(table.read_text())["entries"] if table.exists() else []
    compile_all(sizes)
    for size in sizes:
        found = best(*size)
        entries = [entry for entry in entries if size_of(entry) != size] + [found]
        lines = ",\n".join("  " + json.dumps(entry) for entry in sorted(entries, key=size_of))
        table.write_text(f'{{"device": "{torch.cuda.get_device_name()}", "entries": [\n{lines}\n]}}\n')


def size_of(entry: dict[str, Any]) -> Size:
    """What an entry is for."""
    return entry["tokens"], entry["rows"], entry["columns"], entry["activations"]


if __name__ == "__main__":
    main()
