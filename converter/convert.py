"""The main road: a checkpoint in, an int4 checkpoint out."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from converter.calibrate import Calibration, LayerReport
from converter.output import HASHING_THREADS, OutputDir
from converter.plan import Plan
from converter.prepared import PreparedLayers
from converter.quantize import DEFAULT_METHOD
from converter.ranks import Ranks
from converter.shards import convert_shards
from converter.source import Source
from formats import __version__
from formats.devices import room_for
from formats.errors import UsageError, some
from formats.files import hash_file
from formats.layout import Scheme
from formats.manifest import CalibrationRecord, FileRecord, Manifest, Recipe
from formats.records import to_json
from formats.strict_json import canonical

RELAYOUT = "relayout of "  # what the method of a source is called that was int4 before
DEFAULT_GROUP_SIZE = 256
CONVERTER = f"int4-convert {__version__}"


def make_recipe(
    scheme: Scheme,
    method: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    calibration: CalibrationRecord | None = None,
) -> Recipe:
    """The recipe of this version of the converter."""
    return Recipe(CONVERTER, method, scheme.group_size, scheme.symmetric, include, exclude, calibration)


def recipe_for(
    source: Source,
    group_size: int | None,
    symmetric: bool | None,
    method: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    calibration: CalibrationRecord | None,
) -> Recipe:
    """The recipe for `source` by the options given; one that is in int4 already is taken over as it is.

    Of such a source only `symmetric` is free, which says whether zero points are stored. Raises `UsageError` for
    options that would change its numbers.
    """
    layout = source.layout
    if layout is None:
        scheme = Scheme(DEFAULT_GROUP_SIZE if group_size is None else group_size, symmetric is not False)
        return make_recipe(scheme, method or DEFAULT_METHOD, include, exclude, calibration)
    size = layout.scheme.group_size
    other_size = group_size not in (None, size)
    given: dict[str, object] = {"--group-size": other_size, "--method": method, "--calibration": calibration}
    given |= {"--include": include, "--exclude": exclude}
    if changing := [option for option, value in given.items() if value]:
        raise UsageError(
            f"{source.id}: is in int4 already ({layout.name}, groups of {size}) and taken over as it is; leave "
            f"{some(changing)} out, or convert the model that it was made from"
        )
    scheme = Scheme(size, layout.scheme.symmetric if symmetric is None else symmetric)
    return make_recipe(scheme, RELAYOUT + layout.name, (), ())


def convert(
    source: Source,
    plan: Plan,
    out_dir: Path,
    devices: Sequence[torch.device],
    *,
    windows: Tensor | None = None,
    overwrite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 - a frozen value
    progress: Callable[[int], object] = lambda nbytes: None,
    calibrated: Callable[[LayerReport], object] = lambda report: None,
    written: Callable[[FileRecord], object] = lambda file: None,
) -> Manifest:
    """Carry out `plan` and return what was written; `progress` is called with the source bytes of each chunk done.

    Shards are shared out among `devices`, and what an interrupted run of the same plan has finished is kept: the bytes
    are the same. Calibration runs on the first. Several processes with a shared `out_dir` do a share each; the first of
    `ranks` begins and finishes.

    A calibrated recipe comes with the `windows` [W, T] of tokens that it names; `calibrated` is called for each layer,
    and an interrupted calibration goes on where it stopped. `written` is called with each shard that is whole, in any
    thread.

    Raises `CheckpointError`, `OutputError` or `TemporaryError`; then `out_dir` holds no manifest.
    """
    out = OutputDir(out_dir, source, plan, overwrite=overwrite)
    with ExitStack() as stack:
        out.keep(ranks.led(lambda: stack.enter_context(out).kept))
        prepared = PreparedLayers(out_dir, "" if windows is None else _key(source, plan.recipe))
        if windows is not None:
            with room_for(f"{source.id}: calibration"):
                for report in Calibration(source, plan, devices[0]).run(windows, prepared):
                    calibrated(report)
        remaining = ranks.share(out.remaining)
        done = ranks.share([shard for shard in plan.shards if shard not in out.remaining])
        progress(sum(tensor.spec.nbytes for shard in done for tensor in shard.tensors))
        for shard in done:
            written(out.kept[shard.output].file)
        convert_shards(source, out, remaining, devices, prepared, progress, written)
        ranks.led(lambda: None)  # all have done their part
        manifest = ranks.led(out.finish)
        prepared.clear()
        return manifest


def _key(source: Source, recipe: Recipe) -> str:
    """What layers that are quantised depend on: every option, and the files of the source as they are."""
    digests = {}
    if source.revision is None:  # a commit does not change; times say nothing, a copied file may have those of another
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            files = pool.map(lambda name: hash_file(source.folder / name, source.roots)[1], source.shards)
            digests = dict(zip(source.shards, files, strict=True))
    text = canonical({"recipe": to_json(recipe), "source": [source.id, source.revision], "files": digests})
    return hashlib.sha256(text).hexdigest()
