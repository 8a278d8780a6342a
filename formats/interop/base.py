"""What a neighbouring int4 format is to this project: a relayout of the same codes, scales and zero points."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from formats.codec import Quantized
from formats.errors import CheckpointError
from formats.layout import BITS, CODES_PER_WORD, ROW_WISE, Scheme, TensorSpec, ceil_div

Parts = Mapping[str, Tensor]  # the tensors of one matrix, by what stands behind the name of its module
HEAD = "lm_head"  # the output head, as most models call it
# And as others do, in transformers, which may share the embedding: then it has no tensor.
OTHER_HEADS = (
    "cls.predictions.decoder", "decoder", "embed_out", "generator_lm_head", "head", "lm_head.decoder",
    "lm_head.out_proj", "lm_loss", "mlm_score.decoder", "output", "output_projection", "pred_layer.proj",
    "predictions.decoder", "proj_out", "vocab_projector",
)  # fmt: skip


@dataclass(frozen=True)
class Layout(ABC):
    """How another format stores a matrix [N, K] with G groups of `scheme`; pure relayout both ways, no files.

    A layout knows its own reading of the words (`decode`), which shares nothing with the codec: what `relayout` made is
    proven by it (`formats/interop/proof.py`).
    """

    scheme: Scheme

    name: ClassVar[str]  # as `int4-export --to` and the `quant_method` of its models call it
    words: ClassVar[str]  # the part that holds the codes
    optional: ClassVar[frozenset[str]] = frozenset()  # parts that a source may lack
    metadata: ClassVar[Mapping[str, str]] = {"format": "pt"}  # of its files
    stacks: ClassVar[bool] = False  # experts are written as one tensor, not one by one
    expert_zero_points: ClassVar[bool] = True  # programs read them
    conv1d: ClassVar[bool] = False  # programs take a matrix in place of a Conv1D

    @classmethod
    def for_export(cls, scheme: Scheme) -> "Layout":
        """The layout in which matrices of `scheme` are written."""
        return cls(scheme)

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Layout":
        """The layout of a model by the quantisation settings of its config.json.

        Raises `CheckpointError` for anything that is not plain int4 in groups.
        """

    @abstractmethod
    def refusal(self, rows: int, columns: int) -> str | None:
        """Why it cannot hold a matrix of this shape, or None."""

    @abstractmethod
    def specs(self, rows: int, columns: int, scale_dtype: str) -> dict[str, TensorSpec]:
        """The parts of a matrix, the words first."""

    @abstractmethod
    def shape(self, words: TensorSpec) -> tuple[int, int]:
        """N and K of the matrix whose words are `words`."""

    @abstractmethod
    def relayout(self, matrix: Quantized, columns: int) -> dict[str, Tensor]:
        """The parts of `matrix`; raises `CheckpointError` where they cannot mean the same weights."""

    @abstractmethod
    def restore(self, parts: Parts) -> Quantized:
        """The inverse of `relayout`; raises `CheckpointError` for what has no exact place in this project's format."""

    @abstractmethod
    def decode(self, parts: Parts, rows: slice) -> Tensor:
        """The weights of some rows, whole eights of them but at the end, by the format's own formula: fp32 [R, K]."""

    @abstractmethod
    def config(self, quantized: Sequence[str], kept: Mapping[str, str]) -> dict[str, Any]:
        """The entries of config.json for a model with these modules in int4, and those `kept` as they were.

        Of a kept module there is a regular expression besides, which matches from the start of a name: it finds the
        module under whatever name a program has for it, and none in int4.
        """


def nibbles(words: Tensor) -> Tensor:
    """int32 [R, W] → the nibbles of each word from its low bits up, uint8 [R, 8W]: by shifts, unlike the codec."""
    shifts = torch.arange(0, BITS * CODES_PER_WORD, BITS, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & 0xF).to(torch.uint8).flatten(1)


def words_of(rows: slice) -> slice:
    """The words that hold `rows`, which begin with a whole word, where rows are packed."""
    return slice(rows.start // CODES_PER_WORD, ceil_div(rows.stop, CODES_PER_WORD))


def widened(groups: Tensor, columns: int) -> Tensor:
    """Values of equal groups [R, G] for each of the columns [R, K]."""
    return groups.repeat_interleave(columns // groups.shape[1], dim=1)


def setting(settings: Mapping[str, Any], name: str, accepted: Sequence[Any], default: Any = None) -> Any:
    """The setting `name`, or the default where it is missing or null; `CheckpointError` if it is not `accepted`."""
    found = default if settings.get(name) is None else settings[name]
    if not any(type(found) is type(value) and found == value for value in accepted):
        expected = " or ".join(repr(value) for value in accepted)
        raise CheckpointError(f"{name} is {found!r:.80}, expected {expected}")
    return found


def group_setting(settings: Mapping[str, Any], name: str = "group_size") -> int:
    """The group size in `settings`; raises `CheckpointError` if this project has none like it."""
    found = settings.get(name)
    if type(found) is not int or (found != ROW_WISE and (found <= 0 or found % CODES_PER_WORD)):
        raise CheckpointError(f"{name} is {found!r:.80}, expected {ROW_WISE} or a multiple of {CODES_PER_WORD}")
    return found


def multiple_of_eight(rows: int) -> str | None:
    """Why a format that packs along the rows cannot hold so many, or None."""
    return f"{rows} rows are no multiple of {CODES_PER_WORD}" if rows % CODES_PER_WORD else None


def is_head(module: str) -> bool:
    """Whether the module of that name is the output head."""
    return module.split(".")[-1] == HEAD or module in OTHER_HEADS
