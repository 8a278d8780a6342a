"""The road of a shard: read → device → quantise → write, in threads beside one another, a chunk of rows at a time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from converter.chunks import chunk_bytes, unit_rows
from converter.conversion import Conversion
from converter.journal import ShardRecord
from converter.output import OutputDir
from converter.passage import Copied, Decoded, Passage
from converter.plan import Plan, ShardPlan, TensorPlan
from converter.prepared import PreparedLayers
from converter.quality import sums
from converter.quantize import METHODS
from converter.quantize.search import search
from converter.relayout import Relayout
from converter.source import Source
from formats.codec import check_finite
from formats.container import Entry
from formats.errors import NonFiniteError
from formats.lane import Lane
from formats.layout import CODES_PER_WORD, scale_dtype_for
from formats.manifest import FileRecord, Recipe
from formats.tensors import TORCH_DTYPES, host_buffer

CHUNKS = 4  # on their way
WAITING = 5  # copies of kept ones, to be written and hashed
TORCH_BYTES = 400_000_000  # of a process that has imported it; a GPU takes 500 MB more


def convert_shard(
    source: Source,
    shard: ShardPlan,
    out: OutputDir,
    device: torch.device,
    prepared: PreparedLayers,
    progress: Callable[[int], object],
) -> None:
    """Stream one file of `source` through `device` into `out`; `progress` gets the source bytes of each chunk.

    Raises `CheckpointError` on bad weights or a file that changes meanwhile, `OutputError` where writing fails.
    """
    digest = hashlib.sha256()
    recipe = out.plan.recipe
    tensors = {source.stored_name(plan.name): passage(source, plan, recipe, device, prepared) for plan in shard.tensors}
    with source.open(shard.source) as container, out.writer(shard) as writer:
        entries = container.tensors.items()
        work = [(tensors.get(name), span) for name, entry in entries for span in spans(entry, tensors.get(name))]
        places = [span for _, span in work]
        size = max((end - start for start, end in places), default=1)
        buffers = [host_buffer(size, pinned=device.type == "cuda") for _ in range(CHUNKS)]
        with Lane() as hashing, own_stream(device):
            for chunk, (tensor, _) in zip(container.chunks(places, buffers, digest), work, strict=True):
                if tensor is None:  # scales and the like, which are read on their own
                    continue
                try:
                    parts = list(tensor.convert(chunk))
                except NonFiniteError:
                    refuse_bad_weights(source, tensor.plan)
                    raise
                for name, data in parts:
                    hashing.put(tensor.digests[name].update, data)
                    writer.put(name, data)
                progress(len(chunk) * tensor.growth)
        source_file = FileRecord(shard.source, container.size, digest.hexdigest())
        source.weights.check(source_file)
        rows = tuple(tensor.record(shard.output) for tensor in tensors.values())
        out.record(ShardRecord(FileRecord(shard.output, *writer.finish()), source_file, rows))


def refuse_bad_weights(source: Source, tensor: TensorPlan) -> None:
    """Raise `NonFiniteError` with the place of the first weight of a matrix, or a stack, that is not finite."""
    for i, matrix in enumerate(source.matrices(tensor.name)):
        check_finite(matrix, f"tensor {tensor.name!r}" + (f", matrix {i}" if len(tensor.spec.shape) > 2 else ""))


def memory_needed(plan: Plan) -> str:
    """In words, about how much memory a conversion takes: what torch does, and what each shard has on its way."""
    units = [(tensor, unit_rows(tensor) if tensor.quantized else None) for tensor in plan.tensors]
    chunks = [min(tensor.spec.nbytes, chunk_bytes(tensor.spec, rows)) for tensor, rows in units]
    later = [sum(part.nbytes for part in [*tensor.stored.values()][1:]) for tensor in plan.tensors]
    shard = (CHUNKS + WAITING) * max(chunks) + max(later)
    total = (TORCH_BYTES + shard) / 1e9
    return f"about {total:.1f} GB of memory, and {shard / 1e6:,.0f} MB for each other shard at work"


def warm_up(plan: Plan, devices: Sequence[torch.device]) -> None:
    """Compile the kernels that `plan` needs on every GPU, before threads would all do it at once."""
    kinds = {(tensor.spec.dtype, tensor.matrix.shape[-1]) for tensor in plan.tensors if tensor.quantized}
    recipe = plan.recipe
    for device in {device for device in devices if device.type == "cuda"}:
        for dtype, columns in kinds:
            weight = torch.ones(CODES_PER_WORD, columns, dtype=TORCH_DTYPES[dtype], device=device)
            quantized = METHODS.get(recipe.method, search)(weight, recipe.scheme, TORCH_DTYPES[scale_dtype_for(dtype)])
            sums(weight, quantized, recipe.scheme)


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream of its own for the calling thread, so that shards share a GPU."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device=device))  # type: ignore[no-untyped-call]


def spans(entry: Entry, tensor: Passage | None) -> Iterator[tuple[int, int]]:
    """The bytes of a stored tensor in chunks; nothing becomes of one without a `tensor`."""
    step = chunk_bytes(entry.spec, None if tensor is None else tensor.unit)
    for start in range(entry.start, entry.end, step):
        yield start, min(start + step, entry.end)


def passage(
    source: Source, plan: TensorPlan, recipe: Recipe, device: torch.device, prepared: PreparedLayers
) -> Passage:
    """What becomes of a tensor: int4 of another format is laid out anew, all else quantised, decoded or copied."""
    if plan.name in source.packed:
        return Relayout(plan, recipe, source)
    decode = partial(source.decoded, plan.name) if plan.name in source.fp8 else None
    if plan.quantized:
        return Conversion(plan, recipe, device, prepared, decode)
    return Copied(plan) if decode is None else Decoded(plan, decode)
