"""The road of a matrix that is in int4 already: its words are gathered, laid out anew and proven."""

import hashlib
from collections.abc import Iterator

from converter.plan import TensorPlan
from converter.source import Source
from formats.errors import CheckpointError
from formats.interop.imported import imported
from formats.layout import scale_dtype_for
from formats.manifest import Recipe, TensorRecord
from formats.tensors import TORCH_DTYPES, bytes_of, tensor_from

GROWTH = 4  # bytes that the model has for a byte of words


class Relayout:
    """One matrix of `source.packed` on its way; `digests` are of the tensors stored for it.

    It is held whole, words and all: other formats pack along the rows.
    """

    growth = GROWTH
    unit = None  # bytes, as they come

    def __init__(self, plan: TensorPlan, recipe: Recipe, source: Source) -> None:
        self.plan = plan
        self.digests = {name: hashlib.sha256() for name in plan.stored}
        self._scheme = recipe.scheme
        self._source = source
        self._matrix = source.packed[plan.name]
        self._words = bytearray()

    def convert(self, chunk: memoryview) -> Iterator[tuple[str, bytearray]]:
        """What is to be written, once the last chunk of the words has come; raises `CheckpointError`."""
        self._words += chunk
        layout = self._matrix.layout
        _, spec = self._matrix.parts[layout.words]
        if len(self._words) < spec.nbytes:
            return
        parts = self._source.read_parts(self.plan.name)
        parts[layout.words] = tensor_from(self._words, spec)
        scale_dtype = TORCH_DTYPES[scale_dtype_for(self.plan.spec.dtype)]
        try:
            matrix = imported(layout, parts, self.plan.spec.shape[1], self._scheme, scale_dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self._source.id}: tensor {self.plan.name!r} ({layout.name}): {error}") from None
        self._words = bytearray()
        for name, tensor in zip(self.plan.stored, matrix.tensors(), strict=True):
            yield name, bytes_of(tensor)

    def record(self, file: str) -> TensorRecord:
        """The row of the manifest, once all is hashed; what was lost before is not known."""
        return self.plan.record(file, self.digests, None)
