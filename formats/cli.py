"""`int4-inspect`: what an int4 checkpoint folder is, and whether every byte of it is right."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import click

from formats import __version__
from formats.checkpoint import Checkpoint
from formats.command import Command, echo, printable, quiet_option, run
from formats.manifest import Manifest, TensorRecord
from formats.records import to_json

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name that is nothing else
NAME_WIDTH = 24  # columns that the names of tensors have in any case
EXAMPLES = {
    "What it is made of": "int4-inspect out",
    "Whether every byte of it is right, for a script": "int4-inspect out --verify --quiet",
    "The matrices that lost most": "int4-inspect out --errors | head",
}


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--verify", is_flag=True, help="Read every file and check every hash, header, shape and scale.")
@click.option("--errors", is_flag=True, help="Print how far each quantised matrix is from its source, the worst first.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the sizes as JSON.")
@quiet_option
@click.version_option(__version__)
def command(folder: Path, verify: bool, errors: bool, as_json: bool, quiet: bool) -> None:
    """Describe the int4 checkpoint in FOLDER; exit code 3 says that it is damaged."""
    checkpoint = Checkpoint(folder)
    files = checkpoint.verify() if verify else None
    manifest = checkpoint.manifest
    if as_json:
        fields = {**to_json(manifest), **dataclasses.asdict(manifest.sizes), "verified": verify}
        echo(json.dumps(fields, indent=2))
        return
    if quiet:
        return
    for line in [*_description(manifest), "", *_table(manifest), *(_errors(manifest) if errors else [])]:
        echo(printable(line))
    if verify:
        echo(f"verified: {files} files, {len(manifest.tensors)} tensors, every byte as it was written")


def _description(manifest: Manifest) -> list[str]:
    recipe, source, total = manifest.recipe, manifest.source, manifest.sizes
    lines = [
        f"source     {source.id}" + (f" at {source.revision}" if source.revision else ""),
        f"recipe     {recipe.summary}, by {recipe.converter}",
        f"quantised  {total.quantized} tensors, {total.bits_per_weight:.4f} bits a weight",
        f"kept       {total.kept} tensors",
        f"size       {total.source_bytes / 1e6:,.1f} MB -> {total.stored_bytes / 1e6:,.1f} MB",
    ]
    if seen := recipe.calibration:
        lines.insert(2, f"calibrated {seen.windows} windows of {seen.seq_len} tokens, text {seen.sha256[:12]}")
    lines += [f"included   {pattern}" for pattern in recipe.include]
    lines += [f"excluded   {pattern}" for pattern in recipe.exclude]
    return lines


def _table(manifest: Manifest) -> list[str]:
    """A line for the tensors that differ only in the numbers of their names: layers, experts; int4 ones first."""
    alike: dict[tuple[bool, str, str, str, str], list[TensorRecord]] = {}
    for row in manifest.tensors:
        pattern = NUMBER.sub("*", row.name)
        alike.setdefault((not row.quantized, pattern, str(list(row.shape)), row.dtype, row.reason), []).append(row)
    cells = [("tensors", "", "shape", "type", "bits", "worst error")]
    for (kept, pattern, shape, dtype, reason), rows in sorted(alike.items(), key=lambda item: item[0][0]):
        stored = sum(spec.nbytes for spec in rows[0].stored(manifest.recipe.scheme).values())
        bits = f"{8 * stored / max(1, rows[0].spec.numel):.2f}"
        errors = [row.error.relative_mse if row.error.output is None else row.error.output for row in rows if row.error]
        last = f"kept: {reason}" if kept else f"{max(errors, default=0.0):11.2e}"
        cells.append((pattern, f"{len(rows)} ×", shape, dtype if kept else "int4", bits, last))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    terminal = shutil.get_terminal_size((sys.maxsize, 0)).columns  # nothing is cut for a file or a pipe
    widths[0] = max(NAME_WIDTH, min(widths[0], terminal - sum(widths[1:]) - 2 * (len(widths) - 1)))
    return [
        f"{_cut(name, widths[0]):{widths[0]}}  {count:>{widths[1]}}  {shape:{widths[2]}}  {kind:{widths[3]}}  "
        f"{bits:>{widths[4]}}  {last}"
        for name, count, shape, kind, bits, last in cells
    ]


def _cut(name: str, width: int) -> str:
    """`name` without its middle, where it is wider: the end says most."""
    return name if len(name) <= width else f"{name[: width // 3]}…{name[len(name) - (width - 1 - width // 3) :]}"


def _errors(manifest: Manifest) -> list[str]:
    lines = [
        f"{'' if error.output is None else f'{error.output:.4e}':>12}"
        f"{error.relative_mse:12.4e}{error.cosine:10.6f}{error.clipped:10.4%}  {name}"
        for name, error in manifest.worst_first
    ]
    return ["", f"{'outputs':>11} {'relative MSE':>12}{'cosine':>10}{'clipped':>10}  tensor", *lines]


def main() -> None:
    """Entry point of `int4-inspect`."""
    run(command)
