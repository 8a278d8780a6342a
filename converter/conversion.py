"""The road of a matrix that becomes int4: device → quantise, in blocks that suit the device."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from converter.chunks import block_unit, is_whole, unit_rows
from converter.fp8 import FP8
from converter.passage import Bytes, Decode, Passage, rows_from
from converter.plan import TensorPlan
from converter.prepared import Prepared, PreparedLayers
from converter.quality import error_record, sums
from converter.quantize import METHODS
from converter.quantize.search import search
from formats.codec import Quantized
from formats.devices import block_weights
from formats.errors import NonFiniteError, TemporaryError
from formats.layout import DTYPE_BYTES, ceil_div, scale_dtype_for
from formats.manifest import Recipe
from formats.tensors import TORCH_DTYPES, bytes_of


class Conversion(Passage):
    """A matrix, or a stack, that is quantised on `device`; what calibration has `prepared` is taken from there.

    Stored rows of FP8 become those of the model by `decode`.
    """

    def __init__(
        self,
        plan: TensorPlan,
        recipe: Recipe,
        device: torch.device,
        prepared: PreparedLayers,
        decode: Decode | None,
    ) -> None:
        super().__init__(plan)
        self.unit = unit_rows(plan)
        self.growth = 1 if decode is None else DTYPE_BYTES[plan.spec.dtype]
        self._recipe = recipe
        self._device = device
        self._layers = prepared
        self._prepared: Prepared | None = None  # in memory while the matrix is on its way
        self._decode = decode
        self._method = METHODS.get(recipe.method, search)  # what calibration does not reach
        self._rows = 0
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._later: dict[str, bytearray] = {name: bytearray() for name in [*plan.stored][1:]}

    def convert(self, chunk: memoryview) -> Iterator[tuple[str, Bytes]]:
        """See `Passage`.

        Packed words come at once; scales and zero points, which stand behind them, with the last chunk. Raises
        `NonFiniteError` for weights that are not finite, or overflow as int4.
        """
        weight = rows_from(chunk, self.plan.spec.dtype if self._decode is None else FP8, self.plan.spec.shape[-1])
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
            self.error = error_record(self._sums, self.plan.spec.numel, output)
            self._prepared = None
            yield from self._later.items()

    def _as_meant(self, weight: Tensor) -> Tensor:
        """The next stored rows, as the model has them."""
        if self._decode is None or weight.dtype != TORCH_DTYPES[FP8]:
            return weight
        return self._decode(weight, self._rows)

    def _quantized(self, stored: Tensor) -> Iterator[Quantized]:
        """The next stored rows, quantised in blocks that suit the device.

        Groups lie within rows, so the size of the blocks changes no byte.
        """
        unit = block_unit(self.plan)
        for part in torch.split(stored, unit_rows(self.plan) if is_whole(self.plan) else len(stored)):
            weight = self._turned(part) if self.plan.transposed else part
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
