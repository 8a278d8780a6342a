"""The main road: a checkpoint in, an int4 checkpoint out."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from converter.output import OutputDir
from converter.pipeline import convert_shard
from converter.plan import Plan
from converter.source import Source
from formats import __version__
from formats.layout import Scheme
from formats.manifest import Recipe

CONVERTER = f"int4-convert {__version__}"


@dataclass(frozen=True)
class Summary:
    """What a conversion did, or with `seconds` 0 would do; sizes in bytes of all tensors."""

    quantized: int
    kept: int
    bits_per_weight: float  # of the quantised matrices, scales and zero points included
    source_bytes: int
    output_bytes: int
    seconds: float


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
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Summary:
    """Carry out `plan`; `progress` is called with the source bytes of each tensor done.

    Raises `CheckpointError`, `OutputError` or `TemporaryError`; then `out_dir` holds no manifest.
    """
    started = time.monotonic()
    with OutputDir(out_dir, source, plan, overwrite=overwrite) as out:
        for shard in plan.shards:
            convert_shard(source, shard, out, device, progress)
        out.finish()
    return summarize(plan, time.monotonic() - started)


def summarize(plan: Plan, seconds: float = 0.0) -> Summary:
    """Counts and sizes of `plan`."""
    quantized = [tensor for tensor in plan.tensors if tensor.quantized]
    weights = sum(tensor.spec.numel for tensor in quantized)
    stored = sum(spec.nbytes for tensor in quantized for spec in tensor.stored.values())
    return Summary(
        quantized=len(quantized),
        kept=len(plan.tensors) - len(quantized),
        bits_per_weight=round(8 * stored / weights, 4) if weights else 0.0,
        source_bytes=sum(tensor.spec.nbytes for tensor in plan.tensors),
        output_bytes=plan.nbytes,
        seconds=round(seconds, 3),
    )
