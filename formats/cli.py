"""`int4-inspect`: what an int4 checkpoint folder is, and whether every byte of it is right."""

import dataclasses
import json
from pathlib import Path

import click

from formats import __version__
from formats.checkpoint import Checkpoint
from formats.command import echo, printable, run
from formats.manifest import Manifest
from formats.records import to_json


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--verify", is_flag=True, help="Read every file and check every hash, header, shape and scale.")
@click.option("--errors", is_flag=True, help="Print how far each quantised matrix is from its source, the worst first.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the sizes as JSON.")
@click.version_option(__version__)
def command(folder: Path, verify: bool, errors: bool, as_json: bool) -> None:
    """Describe the int4 checkpoint in FOLDER; exit code 3 says that it is damaged."""
    checkpoint = Checkpoint(folder)
    files = checkpoint.verify() if verify else None
    manifest = checkpoint.manifest
    if as_json:
        fields = {**to_json(manifest), **dataclasses.asdict(manifest.sizes), "verified": verify}
        echo(json.dumps(fields, indent=2))
        return
    for line in _description(manifest) + (_errors(manifest) if errors else []):
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
    for reason, names in manifest.kept.items():
        lines.append(f"  {len(names):4} {reason}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")
    return lines


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
