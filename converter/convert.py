"""The main road: a checkpoint in, an int4 checkpoint out."""

from collections.abc import Callable
from pathlib import Path

import torch

from converter.output import OutputDir
from converter.pipeline import convert_shard
from converter.plan import Plan
from converter.source import Source
from formats import __version__
from formats.layout import Scheme
from formats.manifest import Manifest, Recipe

CONVERTER = f"int4-convert {__version__}"


def make_recipe(scheme: Scheme, method: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> Recipe:
    """The recipe of this version of the converter."""
    return Recipe(CONVERTER, method, scheme.group_size, scheme.symmetric, include, exclude)


def convert(
    source: Source,
    plan: Plan,
    out_dir: Path,
    device: torch.device,
    *,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Manifest:
    """Carry out `plan` and return what was written; `progress` is called with the source bytes of each tensor done.

    Raises `CheckpointError`, `OutputError` or `TemporaryError`; then `out_dir` holds no manifest.
    """
    with OutputDir(out_dir, source, plan, overwrite=overwrite) as out:
        for shard in plan.shards:
            convert_shard(source, shard, out, device, progress)
        return out.finish()
