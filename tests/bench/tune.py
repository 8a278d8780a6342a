"""Measure every sensible option of the Hopper kernels and write the fastest as the table that the runtime ships.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/tune.py TABLE.json
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
from products import operands, relative_error
from timing import copies_for, graph_time

from formats.layout import Scheme
from runtime.kernels.hopper import KERNELS
from runtime.repack import arrange

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GROUP = 128
PROCESSORS = 132
COMPILERS = 12
SHARED_BYTES = 227 << 10

Candidate = tuple[str, dict[str, int]]


def candidates(tokens: int, rows: int, columns: int) -> Iterator[Candidate]:
    """Kernels with options that are worth a try."""
    if tokens <= 16:
        yield from _decode(tokens, rows)
    if 8 < tokens <= 256:
        yield from _batch(tokens, rows, columns)
    if tokens >= 128:
        yield from _prefill(tokens, rows, columns)


def _decode(tokens: int, rows: int) -> Iterator[Candidate]:
    width = 8 if tokens <= 8 else 16
    for height in (16, 32, 64):
        for warps in (4, 8, 16):
            for buffers in (2, 3):
                fits = warps * width * 256 * buffers < SHARED_BYTES and height * warps < 1024
                if fits and PROCESSORS // 3 <= rows // height <= 16 * PROCESSORS:
                    yield "decode", {"rows": height, "warps": warps, "buffers": buffers}


def _batch(tokens: int, rows: int, columns: int) -> Iterator[Candidate]:
    width = min(128, max(16, 1 << (tokens - 1).bit_length()))
    for warps in (4, 8):
        tiles = -(-rows // (16 * warps)) * -(-tokens // width)
        for splits in (1, 2, 3, 4, 8):
            if PROCESSORS * 0.9 <= tiles * splits <= 8 * PROCESSORS and columns // 64 >= 4 * splits:
                yield "batch", {"tokens": width, "warps": warps, "splits": splits, "raster": 8, "buffers": 5}


def _prefill(tokens: int, rows: int, columns: int) -> Iterator[Candidate]:
    for width, buffers in ((128, 6), (256, 3)):
        tiles = -(-rows // 128) * -(-tokens // width)
        for splits in (1, 2, 3, 4):
            if splits > 1 and (
                tiles * splits > 6 * PROCESSORS or tiles % PROCESSORS == 0 or columns // 64 < 8 * splits
            ):
                continue
            for raster in (4, 16) if tokens >= 1024 else (8,):
                yield "prefill", {"tokens": width, "splits": splits, "raster": raster, "buffers": buffers}


@dataclass(frozen=True)
class Trial:
    """A kernel with options, and its microseconds, or None where its result was wrong."""

    kernel: str
    options: dict[str, int]
    us: float | None


def trials(tokens: int, rows: int, columns: int) -> Iterator[Trial]:
    """Every candidate, checked and timed."""
    scheme = Scheme(GROUP)
    x, quantized, _ = operands(tokens, rows, columns, scheme, torch.bfloat16, "cuda")
    words, scale = arrange(quantized)
    copies = [words.clone() for _ in range(copies_for(words.nbytes))]
    for kernel, options in candidates(tokens, rows, columns):
        call = partial(KERNELS[kernel], x, scale=scale, bias=None, group=GROUP, **options)
        right = relative_error(call(words=words), x, quantized, None, scheme) <= MAX_ERROR
        us = graph_time([partial(call, words=copy) for copy in copies]) if right else None
        yield Trial(kernel, options, us)


def fastest(tried: Iterable[Trial]) -> Trial:
    """The fastest whose result was right."""
    return min((trial for trial in tried if trial.us is not None), key=lambda trial: trial.us or 0)


def best(tokens: int, rows: int, columns: int) -> dict[str, Any]:
    """The fastest candidate, as an entry of the table."""
    found = fastest(trials(tokens, rows, columns))
    print(f"{rows:>6}x{columns:<6} {tokens:>5} {found.us:>8.1f} us  {found.kernel} {found.options}", flush=True)
    return {"tokens": tokens, "rows": rows, "columns": columns, "kernel": found.kernel, "options": found.options}


def compile_all(sizes: Iterable[tuple[int, int, int]]) -> None:
    """Run every candidate for tokens, rows and columns once, in several processes: timings then find Triton's cache."""
    jobs = {(*size, kernel, tuple(options.items())) for size in sizes for kernel, options in candidates(*size)}
    kinds = {job[3:]: job for job in sorted(jobs, key=lambda job: -job[1] * job[2])}  # the smallest matrix of a kind
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(run_once, kinds.values()))


def run_once(job: tuple[Any, ...]) -> None:
    """One call of one candidate."""
    tokens, rows, columns, kernel, options = job
    x, quantized, _ = operands(tokens, rows, columns, Scheme(GROUP), torch.bfloat16, "cuda")
    words, scale = arrange(quantized)
    KERNELS[kernel](x, words, scale, None, GROUP, **dict(options))


@click.command(help=__doc__)
@click.argument("table", type=click.Path(path_type=Path))
def main(table: Path) -> None:
    """Write the table."""
    compile_all((tokens, *shape) for shape in SHAPES for tokens in TOKENS)
    entries = [best(tokens, rows, columns) for rows, columns in SHAPES for tokens in TOKENS]
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    table.write_text(f'{{"device": "{torch.cuda.get_device_name()}", "entries": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
