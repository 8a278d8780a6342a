"""Speed and memory of a whole conversion, and of loading its result, beside a plain program that moves the same bytes.

The plain program reads every shard, copies it to the device and writes as many bytes as the converter does, in one
thread or in as many as the converter has shards at work, without hashing or quantising anything. The first load imports
the model's code too. The result is verified, and rows of a matrix are compared with torch's.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/convert.py SOURCE OUT [--json FILE] [-- OPTIONS of int4-convert]
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import click
import tables
import torch

from converter.quantize import METHODS
from converter.shards import SHARDS_AT_ONCE
from converter.source import Source, open_source
from formats.checkpoint import Checkpoint
from formats.files import publish
from formats.layout import scale_dtype_for
from formats.tensors import TORCH_DTYPES, host_buffer

ROUNDS = 3
BLOCK_BYTES = 16 << 20
CHECKED_ROWS = 64
CONVERT = "from converter.cli import main; main()"
LOAD = """
import json, sys, time, torch, runtime
seconds = []
for _ in range(4):
    started = time.perf_counter()
    model = runtime.load(sys.argv[1])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
    del model
print(json.dumps(seconds))
"""


def run(code: str, *arguments: object) -> Any:
    """What a Python process of its own prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    return json.loads(done.stdout)


def move(path: Path, target: Path, nbytes: int, device: torch.device) -> None:
    """Read a file, copy it to the device, and write `nbytes` to `target`, in turns, so that they share the time."""
    buffer = host_buffer(BLOCK_BYTES, pinned=device.type == "cuda")
    size, written = path.stat().st_size, 0
    with path.open("rb", buffering=0) as file, publish(target) as out:
        done = 0
        while count := file.readinto(buffer):
            torch.frombuffer(buffer[:count], dtype=torch.uint8).to(device)
            done += count
            while written < nbytes * done // size:
                part = buffer[: min(BLOCK_BYTES, nbytes * done // size - written)]
                out.write(part, written)
                written += len(part)


def plain_seconds(source: Source, out: Path, target: Path, device: torch.device, threads: int) -> float:
    """Seconds of the plain program."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    sizes = [path.stat().st_size for path in sorted(out.glob("*.i4.safetensors"))]
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        moves = [
            pool.submit(move, source.folder / shard, target / shard, size, device)
            for shard, size in zip(source.shards, sizes, strict=True)
        ]
        for one in moves:
            one.result()
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def check(source: Source, out: Path) -> None:
    """Verify every byte of `out`, and compare the first rows of its first linear layer with what torch finds."""
    checkpoint = Checkpoint(out)
    checkpoint.verify()
    recipe = checkpoint.manifest.recipe
    row = next(row for row in checkpoint.manifest.tensors if row.quantized and not row.features)
    weight = source.read(row.name)[:CHECKED_ROWS]
    expected = METHODS[recipe.method](weight, recipe.scheme, TORCH_DTYPES[scale_dtype_for(row.dtype)])
    first = next(iter(row.stored(recipe.scheme)))
    packed = next(tensor for name, _, tensor in checkpoint.stream(verify=False) if name == first)
    if not torch.equal(packed[:CHECKED_ROWS], expected.packed):
        raise click.ClickException(f"{out}: {row.name} is not what torch finds")


def measure(source: Source, out: Path, options: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Convert and move the same bytes in turn, check the result, load it."""
    summaries, commands = [], []
    plain: dict[int, list[float]] = {1: [], SHARDS_AT_ONCE: []}
    for _ in range(ROUNDS):
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        summaries.append(run(CONVERT, source.folder, out, "--json", *options))
        commands.append(time.perf_counter() - started)
        for threads, seconds in plain.items():
            seconds.append(plain_seconds(source, out, out.with_name(f"{out.name}-plain"), device, threads))
    check(source, out)
    first, *loads = run(LOAD, out)
    seconds, stored = median(summary["seconds"] for summary in summaries), summaries[0]["stored_bytes"]
    return {
        "source_bytes": source.nbytes,
        "stored_bytes": stored,
        "largest_tensor_bytes": max(spec.nbytes for tensors in source.shards.values() for spec in tensors.values()),
        "seconds": seconds,
        "gb_s": round(source.nbytes / seconds / 1e9, 2),
        "percent_of_plain": round(100 * median(plain[1]) / seconds, 1),
        f"percent_of_{SHARDS_AT_ONCE}_threads": round(100 * median(plain[SHARDS_AT_ONCE]) / seconds, 1),
        "command_seconds": round(median(commands), 2),
        "peak_host_bytes": max(summary["peak_host_bytes"] for summary in summaries),
        "peak_gpu_bytes": max(summary["peak_gpu_bytes"] for summary in summaries),
        "first_load_seconds": round(first, 2),
        "load_seconds": round(median(loads), 2),
        "load_gb_s": round(stored / median(loads) / 1e9, 2),
    }


@click.command(help=__doc__)
@click.argument("source", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file too.")
def main(source: str, out: Path, options: tuple[str, ...], json_file: Path | None) -> None:
    """Print the figures; exit with 1 if the result is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
    print(f"{name}, torch {torch.__version__}")
    figures = measure(open_source(source), out, options, device)
    for key, value in figures.items():
        print(f"{key:22}{value:>16,}")
    tables.write(json_file, [figures])


if __name__ == "__main__":
    main()
