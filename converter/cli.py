"""`int4-convert`: the command line of the converter."""

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from torch import Tensor

from converter.calibrate import LayerReport
from converter.convert import DEFAULT_GROUP_SIZE, RELAYOUT, convert, recipe_for
from converter.engines import ENGINES
from converter.folder import HIDDEN
from converter.pipeline import memory_needed, warm_up
from converter.plan import Plan, make_plan
from converter.push import Published, Upload
from converter.quantize import CALIBRATED, DEFAULT_METHOD, METHODS
from converter.ranks import Ranks, joined_ranks, local_device
from converter.source import Source, open_source
from converter.targets import Forecast, forecast
from formats import __version__
from formats.command import Command, complete_folder, echo, quiet_option, run
from formats.devices import keep_freed_memory, parse_devices, peak_memory
from formats.errors import Int4Error, UsageError, some
from formats.layout import MAX_SIZE
from formats.manifest import CalibrationRecord, FileRecord, Manifest, Recipe
from formats.progress import Bar, bar_class
from formats.sizes import Sizes
from formats.texts import calibration_text, drawn_windows, tokenize

STAGING_NAME = f"{HIDDEN}-source"
NAMES = sorted(METHODS.keys() | CALIBRATED.keys())
GROUPS = {
    "How to quantise": ("--group-size", "--scheme", "--method"),
    "Calibration": ("--calibration", "--calibration-tokens", "--seq-len", "--seed"),
    "Which tensors": ("--include", "--exclude"),
    "Where from, and on what": ("--revision", "--device", "--low-disk"),
    "Before you convert": ("--dry-run", "--target", "--tensor-parallel"),
    "Publishing": ("--push-to", "--private", "--create-pr"),
    "What comes out": ("--overwrite", "--quiet", "--json"),
}
EXAMPLES = {
    "What would happen to each tensor, from headers alone": "int4-convert Qwen/Qwen3-0.6B out --dry-run",
    "How vLLM would run it on four GPUs": "int4-convert Qwen/Qwen3-0.6B out --dry-run --target vllm "
    "--tensor-parallel 4",
    "Convert it": "int4-convert Qwen/Qwen3-0.6B out",
    "With less loss, by a text like those the model is for": "int4-convert Qwen/Qwen3-0.6B out --method gptq "
    "--calibration texts.txt",
    "Quantise the output head too, keep the first layer": "int4-convert model out --include lm_head "
    "--exclude 'model.layers.0.*'",
    "Convert and publish it": "int4-convert Qwen/Qwen3-0.6B out --push-to me/Qwen3-0.6B-int4",
}


@click.command(cls=Command, groups=GROUPS, examples=EXAMPLES)
@click.argument("model", shell_complete=complete_folder)
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--group-size", type=int, metavar="N", help="Columns that share a scale: a multiple of 8, or -1 for "
              f"whole rows.  [default: {DEFAULT_GROUP_SIZE}]")  # fmt: skip
@click.option("--scheme", type=click.Choice(["sym", "asym"]), help="Without or with zero points.  [default: sym]")
@click.option("--method", type=click.Choice(NAMES), help="How scales and codes are chosen.  "
              f"[default: {DEFAULT_METHOD}]")  # fmt: skip
@click.option("--calibration", metavar="TEXT", help="A UTF-8 file, or wikitext2, to run the model on: gptq needs it.")
@click.option("--calibration-tokens", type=click.IntRange(min=1), default=131072, metavar="N",
              help="At most this many tokens of the text.")  # fmt: skip
@click.option("--seq-len", default=512, metavar="N", help="Tokens in a window of the calibration.")
@click.option("--seed", type=click.IntRange(0, MAX_SIZE), default=0, metavar="N",
              help="Seed of the random choice of windows.")  # fmt: skip
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantise these too, such as lm_head (repeatable).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep these as they are (repeatable).")
@click.option("--revision", help="Branch, tag or commit of a Hub repository.  [default: its main branch]")
@click.option("--device", "--devices", "devices", metavar="DEVICES", help="Where to quantise: cpu, cuda:0, "
              "cuda:0,cuda:1 or all GPUs.  [default: cuda if there is a GPU, else cpu]")  # fmt: skip
@click.option("--low-disk", is_flag=True, help="Hold at most two weight files of a Hub repository at a time.")
@click.option(
    "--dry-run", is_flag=True, help="Print what would happen to each tensor; fetch no weights, write nothing."
)
@click.option("--target", type=click.Choice(sorted(ENGINES)), help="With --dry-run: which of the engine's kernels "
              "would run each matrix, and what to change.")  # fmt: skip
@click.option("--tensor-parallel", type=click.IntRange(min=1), metavar="N",
              help="GPUs that --target shares each matrix among.  [default: 1]")  # fmt: skip
@click.option("--push-to", metavar="REPO_ID", help="Publish it on the Hub, shard by shard while others are converted.")
@click.option("--private", is_flag=True, help="With --push-to: for yourself alone, if the repository is new.")
@click.option("--create-pr", is_flag=True, help="With --push-to: as a pull request.")
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint in OUT_DIR.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON, with the plan of --dry-run, or where "
              "--push-to published it.")  # fmt: skip
@click.version_option(__version__)
def command(
    model: str,
    out_dir: Path,
    group_size: int | None,
    scheme: str | None,
    method: str | None,
    calibration: str | None,
    calibration_tokens: int,
    seq_len: int,
    seed: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    revision: str | None,
    devices: str | None,
    low_disk: bool,
    dry_run: bool,
    target: str | None,
    tensor_parallel: int | None,
    push_to: str | None,
    private: bool,
    create_pr: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert MODEL, a checkpoint folder or a Hugging Face Hub id, to packed int4 in OUT_DIR.

    A model that is in int4 already (compressed-tensors, GPTQ, AWQ, MLX) is taken over as it is, in its groups.

    PATTERN is a glob on the name of a tensor or its module, or a regular expression after "re:".
    """
    ranks = click.get_current_context().with_resource(joined_ranks())
    _check_options(method or DEFAULT_METHOD, calibration, low_disk=low_disk, ranks=ranks)
    _check_publishing(push_to, private=private, create_pr=create_pr, ranks=ranks)
    _check_forecast(target, tensor_parallel, dry_run=dry_run)
    chosen = parse_devices(local_device(ranks) if devices is None else devices)
    staging = out_dir / STAGING_NAME if low_disk else None
    source = open_source(model, revision, staging=staging, headers_only=dry_run, quiet=quiet)
    windows = text_record = None
    if calibration is not None:
        text = calibration_text(calibration, quiet)
        windows, text_record = _drawn(text, source, calibration_tokens, seq_len, seed)
    symmetric = None if scheme is None else scheme == "sym"
    recipe = recipe_for(source, group_size, symmetric, method, include, exclude, text_record)
    plan = make_plan(source, recipe)
    if dry_run:
        _print_plan(plan, source, None if target is None else forecast(plan, target, tensor_parallel or 1), as_json)
        return
    upload = None
    if push_to is not None:
        begun = Upload(push_to, private=private, create_pr=create_pr, quiet=quiet)
        upload = click.get_current_context().with_resource(begun)
    keep_freed_memory()
    if source.layout is None:
        warm_up(plan, chosen)
    bar = bar_class(quiet or not ranks.leads)
    layers = bar(unit="layer", desc="calibrating", disable=windows is None)
    done = bar(total=_share_bytes(plan, ranks), unit="B", unit_scale=True, desc=source.id)
    with layers, done:
        started = time.monotonic()
        manifest = convert(
            source, plan, out_dir, chosen, windows=windows, overwrite=overwrite, ranks=ranks, progress=done.update,
            calibrated=partial(_show_layer, layers), written=partial(_send, upload, out_dir),
        )  # fmt: skip
        seconds = time.monotonic() - started
    shutil.rmtree(out_dir / STAGING_NAME, ignore_errors=True)  # of this run, or of one that was interrupted
    if ranks.leads:
        _finish(manifest, out_dir, chosen, seconds, upload, as_json=as_json, quiet=quiet)


def _check_options(method: str, calibration: str | None, *, low_disk: bool, ranks: Ranks) -> None:
    if calibration is None and (given := _given("--calibration-tokens", "--seq-len", "--seed")):
        raise UsageError(f"{', '.join(given)}: of which text? give --calibration FILE too")
    if calibration is None and method not in METHODS:
        raise UsageError(f"--method {method}: needs a text to run the model on; give --calibration FILE")
    if calibration is not None and method not in CALIBRATED:
        raise UsageError(
            f"--method {method}: takes no text; leave --calibration out, or choose {some(sorted(CALIBRATED))}"
        )
    if calibration is not None and low_disk:
        raise UsageError("--low-disk: calibration reads all of the model twice; leave one of the two out")
    if calibration is not None and ranks.size > 1:
        raise UsageError("--calibration: goes from layer to layer in one process; run it without torchrun")


def _given(*options: str) -> list[str]:
    """Which of `options` stand on the command line."""
    context = click.get_current_context()
    sources = {param.opts[0]: context.get_parameter_source(str(param.name)) for param in context.command.params}
    return [option for option in options if sources[option] is ParameterSource.COMMANDLINE]


def _check_forecast(target: str | None, tensor_parallel: int | None, *, dry_run: bool) -> None:
    if target is not None and not dry_run:
        raise UsageError("--target: changes nothing of a conversion, it is asked before one; give --dry-run too")
    if tensor_parallel is not None and target is None:
        raise UsageError(f"--tensor-parallel: for which engine? give --target {some(sorted(ENGINES))}")


def _check_publishing(push_to: str | None, *, private: bool, create_pr: bool, ranks: Ranks) -> None:
    if push_to is None and (private or create_pr):
        raise UsageError("--private and --create-pr say how to publish; give --push-to REPO_ID too")
    if push_to is not None and ranks.size > 1:
        raise UsageError("--push-to: is done by one process; run int4-push afterwards, without torchrun")


def _drawn(text: str, source: Source, tokens: int, seq_len: int, seed: int) -> tuple[Tensor, CalibrationRecord]:
    """Windows [W, T] of about so many tokens of `text`, and their record."""
    windows = drawn_windows(tokenize(source.folder, text), seq_len, max(1, tokens // seq_len), seed)
    return windows, CalibrationRecord(hashlib.sha256(text.encode()).hexdigest(), len(windows), seq_len, seed)


def _send(upload: Upload | None, out_dir: Path, shard: FileRecord) -> None:
    if upload is not None:
        upload.put(shard, out_dir / shard.name)


def _publish(upload: Upload, out_dir: Path, manifest: Manifest) -> Published:
    try:
        return upload.commit(out_dir, manifest)
    except Int4Error as error:
        raise type(error)(f"{error}. The checkpoint is whole: int4-push {out_dir} {upload.repo_id} goes on") from None


def _share_bytes(plan: Plan, ranks: Ranks) -> int:
    """The source bytes that this process is about to convert: one of several shows its own progress."""
    return sum(tensor.spec.nbytes for shard in ranks.share(plan.shards) for tensor in shard.tensors)


def _finish(
    manifest: Manifest,
    out_dir: Path,
    devices: Sequence[torch.device],
    seconds: float,
    upload: Upload | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what was done, and publish it where that was asked for; as JSON both are one object, which comes last."""
    host, gpu = peak_memory(devices)
    spent = {"seconds": round(seconds, 3), "peak_host_bytes": host, "peak_gpu_bytes": gpu}
    fields: dict[str, object] = {**dataclasses.asdict(manifest.sizes), **spent}
    silent = quiet or as_json
    if not silent:
        memory = f"{host / 1e9:.1f} GB of memory" + (f" and {gpu / 1e9:.1f} GB of the GPU's" if gpu else "")
        done = f"{_sentence(manifest.recipe, manifest.sizes)}, {seconds:.1f} s on {', '.join(map(str, devices))}"
        echo(f"{out_dir}: {done} with at most {memory}")
    try:
        if upload is not None:
            published = _publish(upload, out_dir, manifest)
            fields |= dataclasses.asdict(published)
            if not silent:
                echo(str(published))
    finally:  # the checkpoint is whole, also where publishing failed
        if as_json:
            echo(json.dumps(fields))


def _show_layer(bar: Bar, report: LayerReport) -> None:
    """A layer more on the bar, and a line of what calibration did not reach in it."""
    bar.total = report.count
    bar.set_postfix(output_error=f"{report.output_error:.2e}")
    bar.update()
    for why, names in (("too few tokens", report.too_few), ("no linear layer", report.other)):
        if names and not bar.disable:
            bar.write(f"{why}, so by search: {some(names)}", file=sys.stderr)


def _sentence(recipe: Recipe, sizes: Sizes) -> str:
    before, after = sizes.source_bytes, sizes.stored_bytes
    rest = f"at {sizes.bits_per_weight:.2f} bits a weight, {sizes.kept} kept"
    if recipe.method.startswith(RELAYOUT):  # of what was int4 before nothing became smaller
        return f"{sizes.quantized} tensors taken over {rest}, {after / 1e6:,.1f} MB"
    smaller = f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({before / max(after, 1):.2f} times smaller)"
    return f"{sizes.quantized} tensors quantised {rest}, {smaller}"


def _print_plan(plan: Plan, source: Source, expected: Forecast | None, as_json: bool) -> None:
    needs = {"download_bytes": source.missing_bytes, "disk_bytes": plan.sizes.stored_bytes + source.staged_bytes}
    if as_json:
        rows = [dataclasses.asdict(tensor) for tensor in plan.tensors]
        fields = {**dataclasses.asdict(plan.sizes), **needs, "tensors": rows}
        echo(json.dumps(fields if expected is None else {**fields, "target": dataclasses.asdict(expected)}))
        return
    verdicts = {} if expected is None else expected.verdicts
    for tensor in plan.tensors:
        row = f"{'int4' if tensor.quantized else 'keep'}  {tensor.name}  {tensor.spec}  ({tensor.reason})"
        echo(f"{row}  -> {verdicts[tensor.name]}" if tensor.name in verdicts else row)
    echo(f"would write: {_sentence(plan.recipe, plan.sizes)}")
    download = f"{needs['download_bytes'] / 1e6:,.1f} MB to download" if source.revision else "nothing to download"
    echo(f"would need: {download}, {needs['disk_bytes'] / 1e6:,.1f} MB of disk for its tensors, {memory_needed(plan)}")
    if expected is not None:
        _print_forecast(expected)


def _print_forecast(expected: Forecast) -> None:
    gpus = "one GPU" if expected.tensor_parallel == 1 else f"{expected.tensor_parallel} GPUs"
    echo(f"{expected.engine} on {gpus}, by what its code says:")
    for verdict, count in Counter(map(str, expected.verdicts.values())).most_common():
        echo(f"  {count} tensors: {verdict}")
    for sentence in expected.advice:
        echo(f"to do: {sentence}")


def main() -> None:
    """Entry point of `int4-convert`."""
    run(command, once_stopped="; the same command goes on behind the files that are finished")
