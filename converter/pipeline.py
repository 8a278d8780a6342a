"""The road of a shard: read → device → quantise → write, in threads beside one another, a chunk of rows at a time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod

import torch
from torch import Tensor

from converter.fp8 import FP8
from converter.journal import ShardRecord
from converter.output import OutputDir
from converter.plan import Plan, ShardPlan, TensorPlan
from converter.prepared import Prepared, PreparedLayers
from converter.quality import error_record, sums
from converter.quantize import METHODS
from converter.quantize.search import search
from converter.relayout import Relayout
from converter.source import Source
from formats.codec import Quantized, check_finite
from formats.container import Entry
from formats.devices import block_weights
from formats.errors import NonFiniteError, TemporaryError
from formats.lane import Lane
from formats.layout import CODES_PER_WORD, DTYPE_BYTES, TensorSpec, ceil_div, scale_dtype_for
from formats.manifest import ErrorRecord, FileRecord, Recipe, TensorRecord
from formats.tensors import TORCH_DTYPES, bytes_of, host_buffer, tensor_from

CHUNK_BYTES = 16 << 20  # of a source tensor on its way at once, unless rows that go together are larger
CHUNKS = 4  # on their way
WAITING = 5  # copies of kept ones, to be written and hashed
TORCH_BYTES = 400_000_000  # of a process that has imported it; a GPU takes 500 MB more

Bytes = bytes | bytearray | memoryview


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
    tensors = {
        source.stored_name(plan.name): conversion(source, plan, recipe, device, prepared) for plan in shard.tensors
    }
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


def chunk_bytes(spec: TensorSpec, rows: int | None) -> int:
    """Of a tensor on its way at once: so many `rows`, or a multiple of them, or without them any number of bytes."""
    unit = 1 if rows is None else max(1, rows * spec.shape[-1] * DTYPE_BYTES[spec.dtype])
    return max(1, CHUNK_BYTES // unit) * unit


def is_whole(tensor: TensorPlan) -> bool:
    """Whether the matrices of a tensor are worked on each for itself, and whole.

    To be turned, or because words of zero points would reach from one of a stack into the next.
    """
    return tensor.transposed or (len(tensor.spec.shape) > 2 and tensor.spec.shape[-2] % CODES_PER_WORD != 0)


def unit_rows(tensor: TensorPlan) -> int:
    """Stored rows that are worked on together: a matrix, or `block_unit`."""
    return tensor.spec.shape[-2] if is_whole(tensor) else block_unit(tensor)


def block_unit(tensor: TensorPlan) -> int:
    """Rows of a matrix that stay together: 8, along which zero points are packed, or without any one, if it is wide."""
    has_zero_points = len(tensor.stored) > 2
    is_wide = CODES_PER_WORD * tensor.matrix.shape[-1] * DTYPE_BYTES[tensor.spec.dtype] > CHUNK_BYTES
    return 1 if is_wide and not has_zero_points else CODES_PER_WORD


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A stream of its own for the calling thread, so that shards share a GPU."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device=device))  # type: ignore[no-untyped-call]


def spans(entry: Entry, tensor: "Conversion | Relayout | None") -> Iterator[tuple[int, int]]:
    """The bytes of a stored tensor in chunks; nothing becomes of one without a `tensor`."""
    step = chunk_bytes(entry.spec, None if tensor is None else tensor.unit)
    for start in range(entry.start, entry.end, step):
        yield start, min(start + step, entry.end)


def decoder(source: Source, name: str) -> Callable[[Tensor, int], Tensor] | None:
    """What makes rows of the model of stored rows, and the number of their first, where they differ."""
    return partial(source.decoded, name) if name in source.fp8 else None


def conversion(
    source: Source, plan: TensorPlan, recipe: Recipe, device: torch.device, prepared: PreparedLayers
) -> "Conversion | Relayout":
    """What becomes of a tensor on its way: int4 of another format is laid out anew, all else converted or copied."""
    if plan.name in source.packed:
        return Relayout(plan, recipe, source)
    return Conversion(plan, recipe, device, prepared, decoder(source, plan.name))


class Conversion:
    """One tensor on its way, chunk by chunk; `digests` are of the tensors stored for it.

    A matrix that calibration has `prepared` is taken from there. Stored rows become those of the model by `decode`,
    with the number of the first of them.
    """

    def __init__(
        self,
        plan: TensorPlan,
        recipe: Recipe,
        device: torch.device,
        prepared: PreparedLayers,
        decode: Callable[[Tensor, int], Tensor] | None,
    ) -> None:
        self.plan = plan
        self.digests = {name: hashlib.sha256() for name in plan.stored}
        self._recipe = recipe
        self._device = device
        self._layers = prepared
        self._prepared: Prepared | None = None  # in memory while the matrix is on its way
        self._error: ErrorRecord | None = None
        self._decode = decode
        self._method = METHODS.get(recipe.method, search)  # what calibration does not reach
        self._rows = 0
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._later: dict[str, bytearray] = {name: bytearray() for name in [*plan.stored][1:]}

    @property
    def growth(self) -> int:
        """Bytes that the model has for a byte that is stored."""
        return 1 if self._decode is None else DTYPE_BYTES[self.plan.spec.dtype]

    @property
    def unit(self) -> int | None:
        """Stored rows that are worked on together; None where bytes are copied."""
        return unit_rows(self.plan) if self.plan.quantized or self._decode is not None else None

    def convert(self, chunk: memoryview) -> Iterator[tuple[str, Bytes]]:
        """What is to be written for the next bytes of the tensor, by the names of the tensors stored for it.

        Packed words come at once; scales and zero points, which stand behind them, with the last chunk. Raises
        `NonFiniteError` for weights that are not finite, or overflow as int4.
        """
        if self.unit is None:
            yield self.plan.name, bytes(chunk)  # a copy, because the chunk's place is used again
            return
        columns = self.plan.spec.shape[-1]
        kind = self.plan.spec.dtype if self._decode is None else FP8
        weight = tensor_from(chunk, TensorSpec(kind, (len(chunk) // (columns * DTYPE_BYTES[kind]), columns)))
        if not self.plan.quantized:
            yield self.plan.name, bytes_of(self._as_meant(weight))
            self._rows += len(weight)
            return
        if self._rows == 0:
            self._prepared = self._layers.find(self.plan.name)
        first, *others = self.plan.stored
        for quantized in self._quantized(weight):
            packed, *rest = quantized.tensors()
            yield first, bytes_of(packed)
            for name, tensor in zip(others, rest, strict=True):
                self._later[name] += bytes_of(tensor)
        if self._rows == prod(self.plan.matrix.shape[:-1]):
            if not self._sums.isfinite().all():
                raise NonFiniteError(
                    f"tensor {self.plan.name!r}: its weights overflow fp32 once they are rounded to int4; expected "
                    "smaller ones: repair the source, or keep this tensor with --exclude"
                )
            output = None if self._prepared is None else self._prepared.output_error
            self._error = error_record(self._sums, self.plan.spec.numel, output)
            self._prepared = None
            yield from self._later.items()

    def _as_meant(self, weight: Tensor) -> Tensor:
        """The next stored rows, as the model has them."""
        if self._decode is None or weight.dtype != TORCH_DTYPES[FP8]:
            return weight
        return self._decode(weight, self._rows)

    def record(self, file: str) -> TensorRecord:
        """The row of the manifest, once all is hashed."""
        return self.plan.record(file, self.digests, self._error)

    def _quantized(self, stored: Tensor) -> Iterator[Quantized]:
        """The next stored rows, quantised in blocks that suit the device.

        Groups lie within rows, so the size of the blocks changes no byte.
        """
        for part in torch.split(stored, unit_rows(self.plan) if is_whole(self.plan) else len(stored)):
            weight = self._turned(part) if self.plan.transposed else part
            unit = block_unit(self.plan)
            rows = ceil_div(block_weights(self._device), weight.shape[1] * unit) * unit
            for block in torch.split(weight, rows):
                yield from self._block(block)

    def _turned(self, stored: Tensor) -> Tensor:
        """A stored matrix [K, N] as [N, K], on the device, or on the host where its memory does not suffice."""
        try:
            return self._as_meant(stored.to(self._device)).mT.contiguous()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return self._as_meant(stored).mT.contiguous()

    def _block(self, weight: Tensor) -> Iterator[Quantized]:
        """A block, or its halves where the memory of the GPU does not suffice."""
        try:
            block = self._as_meant(weight.to(self._device))
            if self._prepared is None:
                scale_dtype = TORCH_DTYPES[scale_dtype_for(self.plan.spec.dtype)]
                quantized = self._method(block, self._recipe.scheme, scale_dtype)
            else:
                quantized = self._prepared.quantized.rows(self._rows, self._rows + len(block), self._device)
            found = sums(block, quantized, self._recipe.scheme)
        except torch.OutOfMemoryError:
            unit = block_unit(self.plan)
            half = len(weight) // 2 // unit * unit
            if not half:
                raise TemporaryError(
                    f"tensor {self.plan.name!r}: even {len(weight)} of its rows do not fit into the memory of "
                    f"{self._device}; free some of it, or use another device"
                ) from None
            torch.cuda.empty_cache()
            for part in (weight[:half], weight[half:]):
                yield from self._block(part)
            return
        self._sums += found
        self._rows += len(weight)
        yield quantized
