"""The road of a tensor: read → device → quantise → write."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from converter.output import OutputDir
from converter.plan import ShardPlan, TensorPlan
from converter.prepared import Prepared, PreparedLayers
from converter.quality import error_record, sums
from converter.quantize import METHODS
from converter.quantize.search import search
from converter.source import Source
from formats.codec import Quantized, check_finite
from formats.devices import block_weights
from formats.errors import NonFiniteError
from formats.layout import CODES_PER_WORD, ceil_div, scale_dtype_for
from formats.manifest import ErrorRecord, FileRecord, Recipe, TensorRecord
from formats.tensors import TORCH_DTYPES, bytes_of, tensor_from


def convert_shard(
    source: Source,
    shard: ShardPlan,
    out: OutputDir,
    device: torch.device,
    prepared: PreparedLayers,
    progress: Callable[[int], object],
) -> None:
    """Stream one file of `source` through `device` into `out`; `progress` gets the source bytes of each tensor.

    Raises `CheckpointError` on bad weights or a file that changes meanwhile, `OutputError` where writing fails.
    """
    recipe = out.plan.recipe
    plans = {tensor.name: tensor for tensor in shard.tensors}
    digest = hashlib.sha256()
    rows = []
    with source.open(shard.source) as container, out.writer(shard) as writer:
        for name, _, data in container.stream(digest):
            stored, error = convert_tensor(plans[name], data, recipe, device, prepared.find(name))
            for stored_name, stored_data in stored.items():
                writer.put(stored_name, stored_data)
            rows.append(_record(plans[name], shard.output, stored, error))
            progress(len(data))
    out.record(FileRecord(shard.source, container.size, digest.hexdigest()), rows)


def convert_tensor(
    plan: TensorPlan, data: bytearray, recipe: Recipe, device: torch.device, prepared: Prepared | None = None
) -> tuple[dict[str, bytearray], ErrorRecord | None]:
    """The stored tensors of one source tensor as bytes, by name, and the error of a quantised one.

    A matrix that calibration has `prepared` is taken from there.
    """
    if not plan.quantized:
        return {plan.name: data}, None
    weight, scheme = tensor_from(data, plan.spec), recipe.scheme
    stored = {name: bytearray() for name in plan.stored}
    total = torch.zeros(4, dtype=torch.float64)
    for block, quantized in _blocks(plan, weight, recipe, device, prepared):
        for name, tensor in zip(stored, quantized.tensors(), strict=True):
            stored[name] += bytes_of(tensor)
        total += sums(block, quantized, scheme)
    if not total.isfinite().all():
        raise NonFiniteError(
            f"tensor {plan.name!r}: weights up to {weight.abs().max().item():.3g} overflow fp32 once they are rounded "
            "to int4; expected smaller ones: repair the source, or keep this tensor with --exclude"
        )
    return stored, error_record(total, weight.numel(), None if prepared is None else prepared.output_error)


def _blocks(
    plan: TensorPlan, weight: Tensor, recipe: Recipe, device: torch.device, prepared: Prepared | None
) -> Iterator[tuple[Tensor, Quantized]]:
    """Blocks of whole rows on the device, a multiple of 8 of them because zero points are packed along the rows.

    Groups lie within rows, so the size of the blocks changes no byte.
    """
    method = METHODS.get(recipe.method, search)  # what calibration does not reach
    scale_dtype = TORCH_DTYPES[scale_dtype_for(plan.spec.dtype)]
    rows = ceil_div(block_weights(device), weight.shape[1] * CODES_PER_WORD) * CODES_PER_WORD
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows].to(device)
        if prepared is not None:
            yield block, _rows_of(prepared.quantized, start, start + rows, device)
            continue
        try:
            quantized = method(block, recipe.scheme, scale_dtype)
        except NonFiniteError:
            check_finite(weight, f"tensor {plan.name!r}")  # again on the whole, to name the place in the file
            raise
        yield block, quantized


def _rows_of(quantized: Quantized, start: int, end: int, device: torch.device) -> Quantized:
    """The rows from `start`, a multiple of 8, to `end`."""
    zero = quantized.zero_point
    return Quantized(
        quantized.packed[start:end].to(device),
        quantized.scale[start:end].to(device),
        None if zero is None else zero[start // CODES_PER_WORD : ceil_div(end, CODES_PER_WORD)].to(device),
    )


def _record(plan: TensorPlan, file: str, stored: dict[str, bytearray], error: ErrorRecord | None) -> TensorRecord:
    digests = tuple(hashlib.sha256(data).hexdigest() for data in stored.values())
    spec = plan.spec
    return TensorRecord(plan.name, spec.dtype, spec.shape, plan.quantized, plan.reason, file, digests, error)
