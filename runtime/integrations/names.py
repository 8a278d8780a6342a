"""Which parameters of a model the tensors of an int4 checkpoint are for, by transformers' own name mapping."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formats.container import Container
from formats.errors import CheckpointError, some
from formats.files import link_roots
from formats.layout import CODES_PER_WORD, PACKED, SCALE, ZERO_POINT, TensorSpec
from formats.mapping import NameMapping
from runtime.swap import is_part

JOINS = ("Concatenate", "Chunk", "Split")  # of rows
ROW_OPERATIONS = ("MergeModulelist", "SplitModulelist", *JOINS)  # on whole rows or groups


class Targets:
    """Which parameters of a model a tensor of its checkpoint is for, by transformers' own name mapping."""

    def __init__(self, model: Any, quantizer: Any) -> None:
        self._mapping = NameMapping(model, quantizer)
        self._model = model

    def assign(self, stored: Mapping[str, TensorSpec]) -> tuple[dict[str, str], set[str]]:
        """Parameter → the int4 tensor that goes into it, or one of them, and the parameters that kept tensors go into.

        Raises `CheckpointError` where they do not fit the model, or int4 and kept tensors would be fused into one.
        """
        names = sorted(name.removesuffix(PACKED) for name in stored if name.endswith(PACKED))
        if lonely := [name for name in names if name + SCALE not in stored]:
            raise CheckpointError(f"holds packed words without scales: {some(lonely)}; fetch the checkpoint again")
        taken = {target: name for name in names for target in self.of_quantized(name, stored)}
        kept: set[str] = set()
        for name in (name for name in stored if not is_part(name, stored)):
            targets = self._mapping.find(name).targets
            kept.update(targets)
            if both := [target for target in targets if target in taken]:
                raise CheckpointError(
                    f"tensor {name!r} is kept, {taken[both[0]]!r} is int4, and the model fuses both into {both[0]!r}; "
                    "convert the model again with both kept, or both int4"
                )
        return taken, kept

    def of_quantized(self, name: str, stored: Mapping[str, TensorSpec]) -> list[str]:
        """Those of an int4 tensor, a matrix or a stack of them, the parts of which are in `stored`.

        Raises `CheckpointError` where the model has none, or transformers would change the weight on its way.
        """
        match, packed = self._mapping.find(name), stored[name + PACKED]
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
        if converter is not None and name + ZERO_POINT in stored:
            rows = [packed.shape[-2], *(self._mapping.held[target].shape[-2] for target in match.targets)]
            _refuse_shared_words(name, rows, converter)
        return list(match.targets)


def _refuse_shared_words(name: str, rows: Sequence[int], converter: Any) -> None:
    """Raise `CheckpointError` where `converter` joins or cuts `rows` some of which share a word of zero points."""
    joins = [kind for operation in converter.operations if (kind := type(operation).__name__) in JOINS]
    if joins and any(number % CODES_PER_WORD for number in rows):
        raise CheckpointError(
            f"tensor {name!r} has {rows[0]} rows with zero points, and transformers joins or cuts them "
            f"({', '.join(joins)}); expected multiples of {CODES_PER_WORD} rows, which share a word: convert the model "
            f"again with --scheme sym or --exclude {name!r}"
        )


def keeps_rows(converter: Any) -> bool:
    """Whether the operations of `converter` do to packed words and scales what they do to the weight."""
    return all(type(operation).__name__ in ROW_OPERATIONS for operation in converter.operations)


def turns(converter: Any) -> bool:
    """Whether `converter` but exchanges the dimensions of the matrices in a stack, which the format has done."""
    return all(
        type(operation).__name__ == "Transpose" and {operation.dim0, operation.dim1} == {1, 2}
        for operation in converter.operations
    )


def renames_weights(conversion: Any) -> bool:
    """Whether `conversion` renames weights by patterns that end with `weight`, so not the parts of int4 ones."""
    from transformers.core_model_loading import WeightRenaming

    patterns = getattr(conversion, "_original_source_patterns", ())
    return type(conversion) is WeightRenaming and any(one.removesuffix("$").endswith("weight") for one in patterns)


def read_headers(files: Sequence[str] | None) -> dict[str, TensorSpec]:
    """Every tensor of the shards `files`, by their headers."""
    stored: dict[str, TensorSpec] = {}
    for file in map(Path, files or ()):
        with Container(file, link_roots(file.parent)) as container:
            stored |= container.header.specs
    if not any(name.endswith(PACKED) for name in stored):
        raise CheckpointError('found no int4 tensor in the files that were chosen; give from_pretrained variant="i4"')
    return stored
