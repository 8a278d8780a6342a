"""`int4-convert`: the command line of the converter."""

import dataclasses
import json
import time
from pathlib import Path

import click
from tqdm import tqdm

from converter.convert import convert, make_recipe
from converter.plan import Plan, make_plan
from converter.quantize import DEFAULT_METHOD, METHODS
from converter.source import open_source
from formats import __version__
from formats.command import echo, run
from formats.devices import parse_device
from formats.layout import Scheme
from formats.sizes import Sizes


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("model")
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--group-size", default=256, help="Columns that share a scale: a multiple of 8, or -1 for whole rows.")
@click.option("--scheme", type=click.Choice(["sym", "asym"]), default="sym", help="Without or with zero points.")
@click.option("--method", type=click.Choice(sorted(METHODS)), default=DEFAULT_METHOD, help="How scales are chosen.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantise these too, such as lm_head (repeatable).")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep these as they are (repeatable).")
@click.option("--revision", help="Branch, tag or commit of a Hub repository.  [default: its main branch]")
@click.option("--device", help="Where to quantise.  [default: cuda if there is a GPU, else cpu]")
@click.option("--dry-run", is_flag=True, help="Print what would happen to each tensor, and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a finished checkpoint in OUT_DIR.")
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary (and with --dry-run the plan) as JSON.")
@click.version_option(__version__)
def command(
    model: str,
    out_dir: Path,
    group_size: int,
    scheme: str,
    method: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    revision: str | None,
    device: str | None,
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert MODEL, a checkpoint folder or a Hugging Face Hub id, to packed int4 in OUT_DIR.

    PATTERN is a glob on the name of a tensor or its module, or a regular expression after "re:".
    """
    recipe = make_recipe(Scheme(group_size, symmetric=scheme == "sym"), method, include, exclude)
    chosen = parse_device(device)
    source = open_source(model, revision, quiet=quiet)
    plan = make_plan(source, recipe)
    if dry_run:
        _print_plan(plan, as_json)
        return
    # disable=None: a bar only where someone watches it.
    with tqdm(total=source.nbytes, unit="B", unit_scale=True, desc=source.id, disable=True if quiet else None) as bar:
        started = time.monotonic()
        manifest = convert(source, plan, out_dir, chosen, overwrite=overwrite, progress=bar.update)
        seconds = time.monotonic() - started
    if as_json:
        echo(json.dumps({**dataclasses.asdict(manifest.sizes), "seconds": round(seconds, 3)}))
    elif not quiet:
        echo(f"{out_dir}: {_sentence(manifest.sizes)}, {seconds:.1f} s on {chosen}")


def _sentence(sizes: Sizes) -> str:
    before, after = sizes.source_bytes, sizes.stored_bytes
    return (
        f"{sizes.quantized} tensors quantised at {sizes.bits_per_weight:.2f} bits a weight, {sizes.kept} kept, "
        f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({before / max(after, 1):.2f} times smaller)"
    )


def _print_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        rows = [dataclasses.asdict(tensor) for tensor in plan.tensors]
        echo(json.dumps({**dataclasses.asdict(plan.sizes), "tensors": rows}))
        return
    for tensor in plan.tensors:
        echo(f"{'int4' if tensor.quantized else 'keep'}  {tensor.name}  {tensor.spec}  ({tensor.reason})")
    echo(f"would write: {_sentence(plan.sizes)}")


def main() -> None:
    """Entry point of `int4-convert`."""
    run(command)
