"""The road of a matrix that is in int4 already: its words are gathered, laid out anew and proven."""

from collections.abc import Iterator

from converter.passage import Bytes, Passage
from converter.plan import TensorPlan
from converter.source import Source
from formats.errors import CheckpointError
from formats.interop.imported import imported
from formats.layout import scale_dtype_for
from formats.manifest import Recipe
from formats.tensors import TORCH_DTYPES, bytes_of, tensor_from

GROWTH = 4  # bytes that the model has for a byte of words


class Relayout(Passage):
    """A matrix of `source.packed`, held whole, words and all: other formats pack along the rows.

    What was lost when it was quantised is not known.
    """

    growth = GROWTH

    def __init__(self, plan: TensorPlan, recipe: Recipe, source: Source) -> None:
        super().__init__(plan)
        self._scheme = recipe.scheme
        self._source = source
        self._matrix = source.packed[plan.name]
        self._words = bytearray()

    def convert(self, chunk: memoryview) -> Iterator[tuple[str, Bytes]]:
        """See `Passage`; all comes with the last chunk of the words. Raises `CheckpointError`."""
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
