"""Which parameters of a model the tensors of an int4 checkpoint are for, by transformers' own name mapping."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formats.container import Container
from formats.errors import CheckpointError, some
from formats.files import link_roots
from formats.layout import PACKED, TensorSpec
from formats.mapping import NameMapping

ROW_OPERATIONS = ("MergeModulelist", "SplitModulelist", "Concatenate", "Chunk", "Split")  # on whole rows or groups


class Targets:
    """Which parameters of a model a tensor of its checkpoint is for, by transformers' own name mapping."""

    def __init__(self, model: Any, quantizer: Any) -> None:
        self._mapping = NameMapping(model, quantizer)
        self._model = model

    def of(self, name: str) -> list[str]:
        """The parameters that `name` goes into, there or not."""
        return list(self._mapping.find(name).targets)

    def of_quantized(self, name: str, packed: TensorSpec) -> list[str]:
        """Those of an int4 tensor, a matrix or a stack of them in `packed`.

        Raises `CheckpointError` where the model has none, or transformers would change the weight on its way.
        """
        match = self._mapping.find(name)
        converter = match.converter
        if converter is not None and not keeps_rows(converter) and not (turns(converter) and len(packed.shape) == 3):
            operations = ", ".join(type(operation).__name__ for operation in converter.operations)
            raise CheckpointError(
                f"tensor {name!r} is int4, and transformers changes it on the way ({operations}), which packed codes do"
                f" not bear; convert the model again with --exclude {name!r}"
            )
        if lacking := [target for target in match.targets if target not in self._mapping.held]:
            model = type(self._model).__name__
            raise CheckpointError(f"holds {name!r}, which {model} lacks ({some(lacking)}); is it the same model?")
        return list(match.targets)


def keeps_rows(converter: Any) -> bool:
    """Whether the operations of `converter` do to packed words and scales what they do to the weight."""
    return all(type(operation).__name__ in ROW_OPERATIONS for operation in converter.operations)


def turns(converter: Any) -> bool:
    """Whether `converter` but exchanges the dimensions of the matrices in a stack, which the format has done."""
    return all(
        type(operation).__name__ == "Transpose" and {operation.dim0, operation.dim1} == {1, 2}
        for operation in converter.operations
    )


def stored_tensors(files: Sequence[str] | None) -> dict[str, TensorSpec]:
    """Every tensor of the shards `files`, by their headers."""
    stored: dict[str, TensorSpec] = {}
    for file in map(Path, files or ()):
        with Container(file, link_roots(file.parent)) as container:
            stored |= container.header.specs
    if not any(name.endswith(PACKED) for name in stored):
        raise CheckpointError('found no int4 tensor in the files that were chosen; give from_pretrained variant="i4"')
    return stored
