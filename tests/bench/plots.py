"""Pictures of what the benchmarks wrote: FILES are the JSON of matmul.py and of model.py, OUT_DIR takes the PNGs.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/plots.py OUT_DIR matmul.json model_1b.json model_8b.json
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from math import ceil
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from limits import bf16_bytes, int4_bytes, least_us, operations
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Records = list[dict[str, Any]]
Points = dict[str, list[tuple[int, float]]]  # by name of the line: M, value
PANELS_WIDE = 3
PANEL = (4.2, 3.2)  # inches


def percent_of_limit(record: dict[str, Any]) -> dict[str, float]:
    """How near our product and cuBLAS come to what their bytes and operations allow."""
    m, n, k = record["m"], record["n"], record["k"]
    work = operations(m, n, k)
    shares = {our_name(record): 100 * least_us(int4_bytes(m, n, k, record["group"]), work) / record["us"]}
    if record["activations"] == "bf16":  # the same product again beside fp8
        shares["cuBLAS bf16"] = 100 * least_us(bf16_bytes(m, n, k), work) / record["cublas_us"]
    return shares


def speedup(record: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as cuBLAS in bf16 our product and those of others are."""
    times = {our_name(record): record["us"], **record["peers"]}
    return {name: record["cublas_us"] / us for name, us in times.items()}


def our_name(record: dict[str, Any]) -> str:
    """The label of a line of ours."""
    return f"int4, G = {record['group']}, {record['activations']} activations"


def panels(records: Records, value: Callable[[dict[str, Any]], dict[str, float]], label: str, level: float) -> Figure:
    """A panel a shape: lines of `value` against tokens, and a level to compare them with."""
    shapes: dict[tuple[int, int], Points] = {}
    for record in records:
        lines = shapes.setdefault((record["n"], record["k"]), defaultdict(list))
        for name, height in value(record).items():
            lines[name].append((record["m"], height))
    wide = min(PANELS_WIDE, len(shapes))
    high = ceil(len(shapes) / wide)
    figure, axes = plt.subplots(
        high, wide, figsize=(PANEL[0] * wide, PANEL[1] * high), squeeze=False, sharey=True, layout="constrained"
    )
    names = sorted({name for lines in shapes.values() for name in lines})
    for axis, ((n, k), lines) in zip(axes.flat, shapes.items(), strict=False):
        axis.axhline(level, color="grey", linestyle=":")
        for name, points in lines.items():
            color = f"C{names.index(name)}"  # the same in every panel
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, color=color)
        tokens = sorted({m for points in lines.values() for m, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [str(m) for m in tokens])
        axis.set_title(f"{n}×{k}")
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    axes.flat[0].set_ylim(bottom=0)
    keys = [Line2D([], [], color=f"C{i}", marker="o", markersize=3) for i in range(len(names))]
    figure.legend(keys, names, loc="outside upper center", ncols=4)
    figure.supxlabel("tokens")
    figure.supylabel(label)
    return figure


def bars(records: Records) -> Figure:
    """How many times better than the bf16 model the int4 one is, a bar a row of model.py, a panel a size."""
    sizes = sorted({record["size"] for record in records})
    rows = [[record for record in records if record["size"] == size] for size in sizes]
    high = 1 + 0.3 * max(map(len, rows))
    figure, axes = plt.subplots(1, len(sizes), figsize=(6 * len(sizes), high), squeeze=False, layout="constrained")
    for axis, size, found in zip(axes.flat, sizes, rows, strict=True):
        names = [bar_name(record) for record in found]
        drawn = axis.barh(names, [record["ratio"] for record in found])
        axis.bar_label(drawn, fmt="%.2f", padding=2)
        axis.axvline(1, color="grey", linestyle=":", zorder=0)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(title=f"Llama {size.upper()}", xlabel="times better than bf16")
    return figure


def bar_name(record: dict[str, Any]) -> str:
    """The label of a bar: what was measured, and how."""
    size = f"{record['batch']}×{record['tokens']}" if record["batch"] else ""
    kind = "" if record["activations"] == "bf16" else record["activations"]
    return " ".join(part for part in (record["section"], size, record["mode"], kind) if part)


def draw_all(records: Records) -> dict[str, Figure]:
    """Every picture that there are records for, by name."""
    products = [record for record in records if "cublas_us" in record]
    models = [record for record in records if "section" in record]
    figures = {}
    if products:
        figures["roofline"] = panels(products, percent_of_limit, "% of the limit with bf16 tensor cores", 100)
        figures["speedup"] = panels(products, speedup, "times as fast as cuBLAS bf16", 1)
    if models:
        figures["model"] = bars(models)
    return figures


@click.command(help=__doc__)
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.argument("files", type=click.Path(exists=True, dir_okay=False, path_type=Path), nargs=-1, required=True)
def main(out_dir: Path, files: Iterable[Path]) -> None:
    """Write the pictures."""
    mpl.use("agg")
    figures = draw_all([record for file in files for record in json.loads(file.read_text())])
    if not figures:
        raise click.UsageError("the files hold no rows of matmul.py or model.py")
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out_dir / f"{name}.png", dpi=150)
        print(out_dir / f"{name}.png")


if __name__ == "__main__":
    main()
