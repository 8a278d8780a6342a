"""`int4-eval`: perplexity, divergence, speed and size of an int4 checkpoint."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from formats import __version__
from formats.command import echo, run
from formats.devices import parse_device, room_for
from formats.errors import CheckpointError, UsageError
from formats.files import publish_bytes
from formats.layout import ceil_div
from formats.manifest import read_manifest
from formats.skeleton import first_line, with_plain_attention
from formats.texts import DATASETS, read_text, tokenize, windows_of
from runtime.evaluate import Evaluation, Measurement, evaluate
from runtime.load import load, resolve
from runtime.ops import FP8_TOKENS
from runtime.report import require_matplotlib, timings, write_report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("checkpoint")
@click.option("--reference", help="The model that it was made from, a folder or a Hub id, to compare with.")
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A UTF-8 file to predict.")
@click.option("--dataset", type=click.Choice(sorted(DATASETS)), help="A standard text from the Hub instead.")
@click.option("--seq-len", default=2048, help="Tokens in a window; windows do not overlap, the tail is dropped.")
@click.option("--max-windows", type=click.IntRange(min=1), help="Stop after so many windows.  [default: all]")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, help="Windows in a forward pass.")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Type to compute in.  [default: the checkpoint's]")
@click.option("--no-join", is_flag=True, help="On a GPU, give layers that share their input a product each.")
@click.option("--activations", type=click.Choice(["fp8"]), help="Round what enters a layer; many tokens are faster.")
@click.option("--device", help="Where to run.  [default: cuda if there is a GPU, else cpu]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file too; "
              "a model card shows those in evaluation.json.")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path, file_okay=False), help="Draw a page into this folder.")
@click.version_option(__version__)
def command(
    checkpoint: str,
    reference: str | None,
    text: Path | None,
    dataset: str | None,
    seq_len: int,
    max_windows: int | None,
    batch_size: int,
    dtype: str | None,
    no_join: bool,
    activations: str | None,
    device: str | None,
    json_file: Path | None,
    report: Path | None,
) -> None:
    """Evaluate the int4 CHECKPOINT, a folder or a Hub id, on a text.

    The text is tokenised whole and once, without special tokens, and every token is predicted from those before it in
    its window.
    """
    if (text is None) == (dataset is None):
        raise UsageError("give a text: either --text FILE or --dataset NAME")
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: its folder does not exist; make it first")
    if activations == "fp8" and batch_size * seq_len < FP8_TOKENS:
        raise UsageError(
            f"--activations fp8 rounds in calls of {FP8_TOKENS} tokens and more, these have {batch_size * seq_len}; "
            f"give --batch-size {ceil_div(FP8_TOKENS, seq_len)} or more"
        )
    if report is not None:
        require_matplotlib()
    place = parse_device(device)
    kind = None if dtype is None else DTYPES[dtype]
    folder = resolve(checkpoint)
    manifest = read_manifest(folder)
    model = load(folder, device=place, dtype=kind, join=False if no_join else None, activations=activations)
    original = None if reference is None else _load_reference(reference, place, kind)
    corpus = read_text(text) if text is not None else DATASETS[str(dataset)]()
    tokens = tokenize(folder, corpus)
    windows = windows_of(tokens, seq_len, max_windows)
    _check_limits(model, windows, folder)
    with tqdm(total=len(windows), unit="window", desc="evaluating", disable=None) as bar, room_for(checkpoint):
        result = evaluate(model, windows, reference=original, batch_size=batch_size, progress=bar.update)
    protocol = {
        "checkpoint": manifest.digest,
        "text": str(text) if text is not None else dataset,
        "seq_len": seq_len,
        "windows": len(windows),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
    }
    summary = _table(result, protocol)
    echo(summary)
    if json_file is not None:
        publish_bytes(json_file, (json.dumps(as_json(result, protocol), indent=2) + "\n").encode())
    if report is not None:
        lengths = tokens[: seq_len * batch_size]  # no longer windows than those of the evaluation
        write_report(report, checkpoint, summary, result, manifest,
                     list(timings(model, original, lengths, batch_size)))  # fmt: skip


def _check_limits(model: Any, windows: Tensor, folder: Path) -> None:
    """Refuse positions and tokens that the tables of the model lack; rotary positions go on past their training."""
    config, (_, seq_len) = model.config, windows.shape
    limit = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None)
    if isinstance(limit, int) and seq_len > limit and not rotary:
        raise UsageError(f"--seq-len {seq_len}: the model has {limit} positions; lower it")
    vocabulary, token = model.get_input_embeddings().weight.shape[0], int(windows.max())
    if token >= vocabulary:
        raise CheckpointError(f"{folder}: its tokenizer gives token {token}, its model knows {vocabulary}")


def _load_reference(reference: str, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    folder = resolve(reference, ignore=["*.bin", "*.pt", "*.pth"])
    load_model = partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        folder, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False,
    )  # fmt: skip
    try:
        model = with_plain_attention(load_model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{reference}: transformers cannot load it ({first_line(error)})") from None
    with room_for(reference):
        placed: nn.Module = model.to(device).eval()
    return placed


def as_json(result: Evaluation, protocol: dict[str, Any]) -> dict[str, Any]:
    """The figures as they stand in `--json`: the model's own at the top, beside them what compares."""
    fields = dataclasses.asdict(result)
    return {**fields.pop("model"), **{key: value for key, value in fields.items() if value is not None}, **protocol}


def _table(result: Evaluation, protocol: dict[str, Any]) -> str:
    columns = [("int4", result.model)]
    if result.reference is not None:
        columns.append(("reference", result.reference))
    lines = [
        f"{protocol['windows']} windows of {protocol['seq_len']} tokens, {protocol['dtype']}, {protocol['device']}",
        f"{'':24}" + "".join(f"{title:>14}" for title, _ in columns),
    ]
    cells = [_cells(measurement) for _, measurement in columns]
    lines += [f"{label:24}" + "".join(f"{cell[label]:>14}" for cell in cells) for label in cells[0]]
    if result.increase is not None and result.kld is not None and result.same_top1 is not None:
        lines += [
            f"perplexity increase     {result.increase:>+14.2%}{_plus_minus(result.increase_se, '.2%')}",
            f"KL divergence, nats     {result.kld.mean:>14.4f}  mean{_plus_minus(result.kld.mean_se, '.4f')}",
            f"{'':24}{result.kld.median:>14.4f}  median",
            f"{'':24}{result.kld.p999:>14.4f}  99.9 %",
            f"same first choice       {result.same_top1:>14.2%}",
        ]
    return "\n".join(lines)


def _plus_minus(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"


def _cells(measurement: Measurement) -> dict[str, str]:
    peak = measurement.peak_memory_bytes
    return {
        "perplexity": f"{measurement.perplexity:.3f}",
        "tokens/s": f"{measurement.tokens_per_second:,.0f}",
        "weights, MB": f"{measurement.weight_bytes / 1e6:,.1f}",
        "peak memory, MB": "on GPU only" if peak is None else f"{peak / 1e6:,.1f}",
    }


def main() -> None:
    """Entry point of `int4-eval`."""
    run(command)
