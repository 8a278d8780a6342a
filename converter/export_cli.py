"""`int4-export`: the command line of the way out."""

import dataclasses
import json
from pathlib import Path

import click

from converter.export import Exported, export
from formats import __version__
from formats.checkpoint import Checkpoint
from formats.command import Command, echo, quiet_option, run
from formats.interop import LAYOUTS
from formats.layout import ROW_WISE
from formats.progress import bar_class

EXAMPLES = {
    "For vLLM and SGLang": "int4-export out out-ct --to compressed-tensors --group-size 128",
    "For mlx-lm": "int4-export out out-mlx --to mlx --group-size 64",
}


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(sorted(LAYOUTS)), help="The layout to write.")
@click.option("--group-size", type=int, metavar="N", help="Split groups into ones of N.  [default: as they are]")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.version_option(__version__)
def command(folder: Path, out_dir: Path, to: str, group_size: int | None, quiet: bool, as_json: bool) -> None:
    """Write the int4 checkpoint in FOLDER for other programs into OUT_DIR, a new or empty folder.

    The codes stay as they are. All weights are compared with those of FOLDER, each by its own format's formula; where
    they cannot be the same nothing is written.
    """
    checkpoint = Checkpoint(folder)
    total = checkpoint.manifest.sizes.stored_bytes
    with bar_class(quiet)(total=total, unit="B", unit_scale=True, desc=to) as done:
        exported = export(checkpoint, out_dir, to, group_size, progress=done.update)
    if as_json:
        echo(json.dumps(dataclasses.asdict(exported)))
    elif not quiet:
        echo(f"{out_dir}: {_sentence(exported)}")


def _sentence(exported: Exported) -> str:
    groups = "one group a row" if exported.group_size == ROW_WISE else f"groups of {exported.group_size}"
    zeros = "" if exported.signed_zeros else ", -0 as 0"
    return (
        f"{exported.tensors} tensors, dequantised weights identical bit for bit{zeros} (checked {exported.checked} of "
        f"{exported.tensors}), {exported.kept} kept, {exported.nbytes / 1e6:,.1f} MB as {exported.to}, {groups}"
    )


def main() -> None:
    """Entry point of `int4-export`."""
    run(command)
