"""`int4-eval`: perplexity, divergence, speed, size and tasks of an int4 checkpoint."""

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from formats import __version__
from formats.architecture import architecture_of, cannot_build, first_line, transformers_bars, with_plain_attention
from formats.command import Command, complete_folder, echo, quiet_option, run
from formats.devices import parse_device, room_for
from formats.errors import CheckpointError, Int4Warning, UsageError
from formats.files import publish_bytes
from formats.layout import ceil_div
from formats.manifest import read_manifest
from formats.progress import bar_class
from formats.strict_json import readable
from formats.texts import DATASETS, load_tokenizer, read_text, tokenize, wikitext2, windows_of
from runtime.evaluate import evaluate, no_language_model
from runtime.integrations.lm_eval import Harness
from runtime.load import OTHERWISE, load, resolve
from runtime.ops import FP8_TOKENS
from runtime.report import require_matplotlib, timings, write_report
from runtime.tables import as_json, table, task_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEQ_LEN = 2048  # tokens in a window, of models that have so many positions
GROUPS = {
    "What to predict": ("--text", "--dataset", "--seq-len", "--max-windows"),
    "Tasks": ("--tasks", "--num-fewshot", "--limit", "--include-path"),
    "Compared with what": ("--reference",),
    "How to run": ("--batch-size", "--device", "--dtype", "--activations", "--no-join"),
    "What comes out": ("--json", "--report", "--quiet"),
}
EXAMPLES = {
    "Perplexity on a text": "int4-eval out --text novel.txt --seq-len 512",
    "What the quantisation cost": "int4-eval out --reference Qwen/Qwen3-0.6B --dataset wikitext2",
    "Tasks, and the same of the original": "int4-eval out --reference model --tasks hellaswag,arc_easy --batch-size 8",
    "Figures for the model card that int4-push makes": "int4-eval out --text novel.txt --json out/evaluation.json",
    "Perplexity as a page with pictures": "int4-eval out --reference model --text novel.txt --report page",
}


@click.command(cls=Command, groups=GROUPS, examples=EXAMPLES)
@click.argument("checkpoint", shell_complete=complete_folder)
@click.option("--reference", metavar="MODEL", shell_complete=complete_folder,
              help="The model that it was made from, a folder or a Hub id, to compare with.")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A UTF-8 file to predict.")
@click.option("--dataset", type=click.Choice(sorted(DATASETS)), help="A standard text from the Hub instead.")
@click.option("--seq-len", type=int, metavar="N", help="Tokens in a window; windows do not overlap, the tail is "
              f"dropped.  [default: {SEQ_LEN}, or the model's positions where they are fewer]")  # fmt: skip
@click.option("--max-windows", type=click.IntRange(min=1), metavar="N",
              help="Stop after so many windows.  [default: all]")  # fmt: skip
@click.option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness, such as hellaswag,arc_easy.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples before each question.  "
              "[default: as the task says]")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N",
              help="Take so many questions of each task, for a first look.  [default: all]")  # fmt: skip
@click.option("--include-path", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="A folder with tasks of your own, as YAML files.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=1, metavar="N",
              help="Windows or requests in a forward pass.")  # fmt: skip
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Type to compute in.  [default: the checkpoint's]")
@click.option("--no-join", is_flag=True, help="On a GPU, give layers that share their input a product each.")
@click.option("--activations", type=click.Choice(["fp8"]), help="Round activations to fp8 in calls of "
              f"{FP8_TOKENS} tokens and more: faster, slightly other results.")  # fmt: skip
@click.option("--device", help="Where to run.  [default: cuda if there is a GPU, else cpu]")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures to this "
              "file too; a model card shows those in evaluation.json.")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path, file_okay=False),
              help="Draw a page into this folder; needs matplotlib (the extra plots).")  # fmt: skip
@quiet_option
@click.version_option(__version__)
def command(
    checkpoint: str,
    reference: str | None,
    text: Path | None,
    dataset: str | None,
    seq_len: int | None,
    max_windows: int | None,
    tasks: str | None,
    num_fewshot: int | None,
    limit: int | None,
    include_path: Path | None,
    batch_size: int,
    dtype: str | None,
    no_join: bool,
    activations: str | None,
    device: str | None,
    json_file: Path | None,
    report: Path | None,
    quiet: bool,
) -> None:
    """Evaluate the int4 CHECKPOINT, a folder or a Hub id, on a text, on tasks of lm-evaluation-harness, or on both.

    The text is tokenised whole and once, without special tokens, and every token is predicted from those before it in
    its window.
    """
    given = [option for option in (text, dataset) if option is not None]
    if len(given) == 2 or not (given or tasks):
        raise UsageError("give a text, either --text FILE or --dataset NAME, or --tasks NAMES")
    _check_output(json_file, report, has_text=bool(given))
    harness = None
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        harness = Harness(names, num_fewshot=num_fewshot, limit=limit, folder=include_path, quiet=quiet)
    place = parse_device(device)
    kind = None if dtype is None else DTYPES[dtype]
    folder = resolve(checkpoint, quiet=quiet)
    manifest = read_manifest(folder)
    windows = None
    if given:
        tokens = tokenize(folder, read_text(text) if text is not None else wikitext2(DATASETS[str(dataset)], quiet))
        windows = windows_of(tokens, _window_length(folder, seq_len), max_windows)
        if activations == "fp8":
            _check_fp8(batch_size, windows)
    with transformers_bars(quiet):
        model = load(folder, device=place, dtype=kind, join=False if no_join else None, activations=activations)
    original = None if reference is None else _load_reference(reference, place, kind, quiet)
    setting = {"checkpoint": manifest.digest, **_setting(model, place, activations, no_join=no_join)}
    page, fields = list[str](), dict[str, Any]()
    if windows is not None:
        _check_vocabulary(model, windows, folder)
        with bar_class(quiet)(total=len(windows), unit="window", desc="evaluating") as bar, room_for(checkpoint):
            result = evaluate(model, windows, reference=original, batch_size=batch_size, progress=bar.update)
        protocol = {"text": str(given[0]), "seq_len": windows.shape[1], "windows": len(windows), **setting}
        page.append(table(result, protocol))
        fields = as_json(result, protocol)
    if harness is not None:
        tokenizer = load_tokenizer(folder)
        with room_for(checkpoint):
            found = harness.run(model, tokenizer, batch_size)
            expected = None if original is None else harness.run(original, tokenizer, batch_size)
        page.append(task_table(found, expected))
        fields |= {"tasks": [dataclasses.asdict(score) for score in found], "harness": harness.options, **setting}
        if expected is not None:
            fields.setdefault("reference", {})["tasks"] = [dataclasses.asdict(score) for score in expected]
    if not quiet:
        echo("\n\n".join(page))
    if json_file is not None:
        publish_bytes(json_file, readable(fields))
    if report is not None and windows is not None:
        lengths = tokens[: windows.shape[1] * batch_size]  # no longer windows than those of the evaluation
        write_report(report, checkpoint, page[0], result, manifest,
                     list(timings(model, original, lengths, batch_size)))  # fmt: skip


def _check_output(json_file: Path | None, report: Path | None, *, has_text: bool) -> None:
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: its folder does not exist; make it first")
    if report is not None and not has_text:
        raise UsageError("--report draws what a text gives; give --text FILE or --dataset NAME too")
    if report is not None:
        require_matplotlib()


def _window_length(folder: Path, seq_len: int | None) -> int:
    """Tokens in a window of the model in `folder`.

    Raises `UsageError` for more than its table of positions has, and warns of more than rotary positions were made for.
    """
    _, config = architecture_of(folder, OTHERWISE)
    config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        limit = None
    if seq_len is None:
        return min(SEQ_LEN, limit or SEQ_LEN)
    if limit is not None and seq_len > limit:
        if not (getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None)):
            raise UsageError(f"--seq-len {seq_len}: the model has {limit} positions; lower it")
        text = (
            f"--seq-len {seq_len}: more than the {limit} positions that the model was made for; it predicts worse there"
        )
        warnings.warn(text, Int4Warning, stacklevel=2)
    return seq_len


def _check_fp8(batch_size: int, windows: Tensor) -> None:
    count, seq_len = windows.shape
    tokens, needed = min(batch_size, count) * seq_len, ceil_div(FP8_TOKENS, seq_len)
    if tokens < FP8_TOKENS:
        more = f", and as many windows, of which there are {count}" if count < needed else ""
        raise UsageError(
            f"--activations fp8 rounds in calls of {FP8_TOKENS} tokens and more, these have {tokens}; "
            f"give --batch-size {needed} or more{more}"
        )


def _setting(model: nn.Module, place: torch.device, activations: str | None, *, no_join: bool) -> dict[str, Any]:
    """What the figures depend on beside the checkpoint and what it is given."""
    return {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        "activations": activations,
        **({"join": False} if no_join else {}),
    }


def _check_vocabulary(model: Any, windows: Tensor, folder: Path) -> None:
    try:
        vocabulary = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError) as error:
        raise no_language_model(model, first_line(error)) from None
    if (token := int(windows.max())) >= vocabulary:
        raise CheckpointError(f"{folder}: its tokenizer gives token {token}, its model knows {vocabulary}")


def _load_reference(reference: str, device: torch.device, dtype: torch.dtype | None, quiet: bool) -> nn.Module:
    """The model that `load` would build of a checkpoint of `reference`, with its own weights."""
    folder = resolve(reference, ignore=["*.bin", "*.pt", "*.pth"], quiet=quiet)
    otherwise = "leave --reference out"
    architecture, config = architecture_of(folder, otherwise)
    load_model = partial(
        architecture.from_pretrained,
        folder, config=config, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False,
    )  # fmt: skip
    try:
        with transformers_bars(quiet):
            model = with_plain_attention(load_model)
    except Exception as error:  # a model is data from outside: whatever transformers makes of it
        raise cannot_build(folder, error, otherwise) from None
    with room_for(reference):
        placed: nn.Module = model.to(device).eval()
    return placed


def main() -> None:
    """Entry point of `int4-eval`."""
    run(command)
