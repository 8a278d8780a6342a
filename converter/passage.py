"""What becomes of one tensor on its way from a source file into an output file, chunk by chunk."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor

from converter.chunks import unit_rows
from converter.fp8 import FP8
from converter.plan import TensorPlan
from formats.layout import DTYPE_BYTES, TensorSpec
from formats.manifest import ErrorRecord, TensorRecord
from formats.tensors import bytes_of, tensor_from

Bytes = bytes | bytearray | memoryview
Decode = Callable[[Tensor, int], Tensor]  # stored rows, and the number of their first → rows as the model has them


class Passage(ABC):
    """One tensor on its way; `digests` are of the tensors that are stored for it.

    Its stored bytes come in multiples of `unit` rows, or where that is None as they come; the model has `growth` bytes
    for each of them. `error` is known at the end, of what was quantised here.
    """

    growth: int = 1
    unit: int | None = None
    error: ErrorRecord | None = None

    def __init__(self, plan: TensorPlan) -> None:
        self.plan = plan
        self.digests = {name: hashlib.sha256() for name in plan.stored}

    @abstractmethod
    def convert(self, chunk: memoryview) -> Iterator[tuple[str, Bytes]]:
        """What is to be written for the next bytes of the tensor, by the names of the tensors stored for it."""

    def record(self, file: str) -> TensorRecord:
        """The row of the manifest, once all is hashed."""
        return self.plan.record(file, self.digests, self.error)


class Copied(Passage):
    """A tensor that stays as it is, byte for byte."""

    def convert(self, chunk: memoryview) -> Iterator[tuple[str, Bytes]]:
        """See `Passage`."""
        yield self.plan.name, bytes(chunk)  # a copy, because the chunk's place is used again


class Decoded(Passage):
    """A matrix in FP8 that is kept, as the 16 bits that it means."""

    def __init__(self, plan: TensorPlan, decode: Decode) -> None:
        super().__init__(plan)
        self.growth = DTYPE_BYTES[plan.spec.dtype]
        self.unit = unit_rows(plan)
        self._decode = decode
        self._rows = 0

    def convert(self, chunk: memoryview) -> Iterator[tuple[str, Bytes]]:
        """See `Passage`."""
        rows = rows_from(chunk, FP8, self.plan.spec.shape[-1])
        yield self.plan.name, bytes_of(self._decode(rows, self._rows))
        self._rows += len(rows)


def rows_from(chunk: memoryview, dtype: str, columns: int) -> Tensor:
    """Bytes of whole rows as a tensor [R, K]."""
    return tensor_from(chunk, TensorSpec(dtype, (len(chunk) // (columns * DTYPE_BYTES[dtype]), columns)))
