"""How large the tensors of a checkpoint are, before and after."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from formats.layout import TensorSpec


@dataclass(frozen=True)
class Sizes:
    """Counts of source tensors and bytes of all; bits per weight are those of quantised tensors, scales included."""

    quantized: int
    kept: int
    bits_per_weight: float
    source_bytes: int
    stored_bytes: int


def sizes_of(tensors: Iterable[tuple[TensorSpec, bool, Mapping[str, TensorSpec]]]) -> Sizes:
    """Add up tensors given as source spec, whether quantised, and what is stored for it."""
    count = {True: 0, False: 0}
    source_bytes = {True: 0, False: 0}
    stored_bytes = {True: 0, False: 0}
    weights = 0
    for spec, quantized, stored in tensors:
        count[quantized] += 1
        source_bytes[quantized] += spec.nbytes
        stored_bytes[quantized] += sum(part.nbytes for part in stored.values())
        weights += spec.numel if quantized else 0
    return Sizes(
        quantized=count[True],
        kept=count[False],
        bits_per_weight=round(8 * stored_bytes[True] / weights, 4) if weights else 0.0,
        source_bytes=sum(source_bytes.values()),
        stored_bytes=sum(stored_bytes.values()),
    )
