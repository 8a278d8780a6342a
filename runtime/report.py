"""A page of figures and pictures about an int4 model: `report.html`, which holds its pictures, and these as PNGs."""

import base64
import html
import io
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from formats.errors import UsageError
from formats.files import make_folder, publish_bytes
from formats.manifest import Manifest
from runtime.evaluate import BIN_EDGES, Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_NAME = "report.html"
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
ROUNDS = 5
STYLE = "body{font:15px sans-serif;max-width:60em;margin:2em auto}img{width:100%}"


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a forward pass over a batch of windows of `seq_len` tokens; None without a reference."""

    seq_len: int
    model_ms: float
    reference_ms: float | None


def require_matplotlib() -> None:
    """Raise `UsageError` where there is no matplotlib: before an evaluation, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--report draws with matplotlib, which is not installed; pip install 'int4-convert[plots]'"
        ) from None


@torch.inference_mode()
def timings(model: nn.Module, reference: nn.Module | None, tokens: Tensor, batch_size: int) -> Iterator[Timing]:
    """How long a batch takes, by the length of its windows, as far as the tokens [T] of the text reach."""
    device = next(model.parameters()).device
    for seq_len in LENGTHS:
        if batch_size * seq_len > len(tokens):
            return
        batch = tokens[: batch_size * seq_len].view(batch_size, seq_len).to(device)
        taken = [None if one is None else _milliseconds(one, batch) for one in (model, reference)]
        yield Timing(seq_len, taken[0] or 0.0, taken[1])


def _milliseconds(model: nn.Module, batch: Tensor) -> float:
    times = []
    for _ in range(ROUNDS + 1):  # the first compiles
        started = time.perf_counter()
        logits = model(input_ids=batch, use_cache=False).logits
        logits[0, 0, 0].item()  # waits for the GPU
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def write_report(
    folder: Path, title: str, summary: str, result: Evaluation, manifest: Manifest, times: Sequence[Timing]
) -> None:
    """Write the page and its pictures into `folder`; `summary` is the table that the command prints."""
    make_folder(folder)
    images = []
    for name, figure in draw(result, manifest, times).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        publish_bytes(folder / f"{name}.png", buffer.getvalue())
        images.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><pre>{html.escape(summary)}</pre>{''.join(images)}"
    )
    publish_bytes(folder / PAGE_NAME, page.encode())


def draw(result: Evaluation, manifest: Manifest, times: Sequence[Timing]) -> dict[str, "Figure"]:
    """Every picture that there are figures for, by name."""
    figures = {"model": _bars(result)}
    if any(row.error is not None for row in manifest.tensors):  # what was taken over as it is has none
        figures["layers"] = _layers(manifest)
    if result.kld is not None:
        figures["divergence"] = _histogram(result.kld.histogram, result.kld.mean)
    if times:
        figures["times"] = _times(times)
    return figures


def _axes(wide: int = 1) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    return figure, figure.subplots(1, wide)


def _bars(result: Evaluation) -> "Figure":
    """Memory, speed and perplexity, beside those of the reference."""
    found = {"int4": result.model} | ({} if result.reference is None else {"reference": result.reference})
    figure, axes = _axes(3)
    for axis, title, values, errors in (
        (axes[0], "weights, MB", [one.weight_bytes / 1e6 for one in found.values()], None),
        (axes[1], "tokens/s", [one.tokens_per_second for one in found.values()], None),
        (axes[2], "perplexity", [one.perplexity for one in found.values()],
         [one.perplexity_se or 0.0 for one in found.values()]),
    ):  # fmt: skip
        bars = axis.bar(list(found), values, yerr=errors, color=["C0", "C7"][: len(found)])
        axis.bar_label(bars, fmt="{:,.4g}")
        axis.set_title(title)
        axis.margins(y=0.15)
    return figure


def _layers(manifest: Manifest) -> "Figure":
    """The error of every matrix, of its outputs where they are known, by its layer; a line for each kind."""
    figure, axis = _axes()
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in manifest.tensors:
        if row.error is not None:
            parts = row.name.split(".")
            number = next((int(part) for part in parts if part.isdigit()), 0)
            kind = ".".join(parts[-2:-1]) or row.name
            error = row.error.relative_mse if row.error.output is None else row.error.output
            kinds.setdefault(kind, []).append((number, error))
    for kind, points in kinds.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=kind)
    what = "outputs" if manifest.recipe.calibration else "weights"
    axis.set(title=f"relative squared error of the {what}", xlabel="layer", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right center", fontsize="small")
    return figure


def _histogram(counts: Sequence[int], mean: float) -> "Figure":
    figure, axis = _axes()
    axis.stairs(counts, BIN_EDGES, fill=True)
    axis.axvline(mean, color="C1", label=f"mean {mean:.4f}")
    axis.set(title="KL divergence of the next token from the reference, nats", ylabel="tokens", xscale="log")
    axis.legend()
    return figure


def _times(times: Sequence[Timing]) -> "Figure":
    figure, axis = _axes()
    lengths = [one.seq_len for one in times]
    axis.plot(lengths, [one.model_ms for one in times], marker="o", label="int4")
    if times[0].reference_ms is not None:
        axis.plot(lengths, [one.reference_ms for one in times], marker="o", color="C7", label="reference")
    axis.set(title="a batch, by the length of its windows", xlabel="tokens in a window", ylabel="ms", yscale="log")
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.legend()
    return figure
