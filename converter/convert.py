"""The main road: a checkpoint in, an int4 checkpoint out."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock

import torch
from torch import Tensor

from converter.calibrate import Calibration, LayerReport
from converter.output import OutputDir
from converter.pipeline import convert_shard
from converter.plan import Plan, ShardPlan
from converter.prepared import PreparedLayers
from converter.source import Source
from formats import __version__
from formats.layout import Scheme
from formats.manifest import CalibrationRecord, Manifest, Recipe
from formats.records import to_json
from formats.strict_json import canonical

CONVERTER = f"int4-convert {__version__}"
SHARDS_AT_ONCE = 4  # on a GPU; a CPU is busy with one


def make_recipe(
    scheme: Scheme,
    method: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    calibration: CalibrationRecord | None = None,
) -> Recipe:
    """The recipe of this version of the converter."""
    return Recipe(CONVERTER, method, scheme.group_size, scheme.symmetric, include, exclude, calibration)


def convert(
    source: Source,
    plan: Plan,
    out_dir: Path,
    devices: Sequence[torch.device],
    *,
    windows: Tensor | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
    calibrated: Callable[[LayerReport], object] = lambda report: None,
) -> Manifest:
    """Carry out `plan` and return what was written; `progress` is called with the source bytes of each chunk done.

    Shards are shared out among `devices`, and what an interrupted run of the same plan has finished is kept: the bytes
    are the same. Calibration runs on the first.

    A calibrated recipe comes with the `windows` [W, T] of tokens that it names; `calibrated` is called for each layer,
    and an interrupted calibration goes on where it stopped. Raises `CheckpointError`, `OutputError` or
    `TemporaryError`; then `out_dir` holds no manifest.
    """
    with OutputDir(out_dir, source, plan, overwrite=overwrite) as out:
        prepared = PreparedLayers(out_dir, _key(source, plan.recipe))
        if windows is not None:
            for report in Calibration(source, plan, devices[0]).run(windows, prepared):
                calibrated(report)
        kept = {shard.source for shard in plan.shards} - {shard.source for shard in out.remaining}
        progress(sum(spec.nbytes for name in kept for spec in source.shards[name].values()))
        convert_shards(source, out, devices, prepared, progress)
        manifest = out.finish()
        prepared.clear()
        return manifest


def convert_shards(
    source: Source,
    out: OutputDir,
    devices: Sequence[torch.device],
    prepared: PreparedLayers,
    progress: Callable[[int], object],
) -> None:
    """Convert what remains, several shards at once: one thread alone hashes more slowly than a disk reads."""
    idle: SimpleQueue[torch.device] = SimpleQueue()
    for device in [device for _ in range(SHARDS_AT_ONCE) for device in devices if device.type == "cuda"] or devices:
        idle.put(device)
    shards, stopped, one_at_a_time = out.remaining, Event(), Lock()

    def note(nbytes: int) -> None:
        if stopped.is_set():
            raise CancelledError
        with one_at_a_time:
            progress(nbytes)

    def convert_next(shard: ShardPlan) -> None:
        device = idle.get()
        try:
            convert_shard(source, shard, out, device, prepared, note)
        finally:
            idle.put(device)

    with ThreadPoolExecutor(idle.qsize()) as pool:
        try:
            for future in as_completed([pool.submit(convert_next, shard) for shard in shards]):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _key(source: Source, recipe: Recipe) -> str:
    """What layers that are quantised depend on: every option, and the files of the source as they are."""
    stats = {name: (source.folder / name).stat() for name in source.shards}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    text = canonical({"recipe": to_json(recipe), "source": source.id, "files": files})
    return hashlib.sha256(text).hexdigest()
