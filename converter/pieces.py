"""What a quantised tensor is in other programs: a linear layer, or, of fused experts, several for every expert."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.expert_names import JOINED, Experts, experts_of
from formats.codec import Quantized
from formats.interop.base import Layout
from formats.interop.groups import cut, split
from formats.interop.proof import prove
from formats.layout import Scheme, TensorSpec, scale_dtype_for
from formats.manifest import TensorRecord
from formats.selection import WEIGHT

LEAVES = ("gate_proj", "up_proj", "down_proj")
FUSED = {"gate_up_proj": LEAVES[:2]}  # the first half of its rows, and the second
ONE_BY_ONE = re.compile(r"(^|[._])experts\.\d+\.")


@dataclass(frozen=True)
class Piece:
    """The linear layer `module` elsewhere: these `rows` of a matrix, or of these `experts` of a stack."""

    module: str
    rows: range
    experts: range | None = None
    stacked: bool = False  # it is a layer for all of them, which has them in one tensor

    def specs(self, row: TensorRecord, layout: Layout) -> dict[str, TensorSpec]:
        """The tensors that `layout` has for it, by their full names."""
        front = (len(self.experts),) if self.experts is not None and self.stacked else ()
        parts = layout.specs(len(self.rows), row.matrix.shape[-1], scale_dtype_for(row.dtype))
        return {f"{self.module}.{name}": TensorSpec(part.dtype, front + part.shape) for name, part in parts.items()}

    def relaid(self, stored: Quantized, columns: int, scheme: Scheme, layout: Layout) -> tuple[dict[str, Tensor], bool]:
        """Its tensors by their full names, each matrix proven, and whether zeros have the same sign.

        Raises `CheckpointError` where they cannot mean the same weights as those `stored` of `scheme`.
        """
        matrices = [stored] if self.experts is None else [stored.matrix(index) for index in self.experts]
        found: list[dict[str, Tensor]] = []
        same_signs = True
        for matrix in matrices:
            part = split(cut(matrix, self.rows), columns, scheme, layout.scheme.group_size)
            found.append(layout.relayout(part, columns))
            same_signs &= prove(layout, found[-1], matrix, columns, scheme, self.rows)
        parts = found[0]
        if self.stacked:
            parts = {name: torch.stack([one[name] for one in found]) for name in parts}
        return {f"{self.module}.{name}": tensor for name, tensor in parts.items()}, same_signs


@dataclass(frozen=True)
class Target:
    """A layout, for a model of these types, that of the whole model first."""

    layout: Layout
    model_types: tuple[str, ...]

    @property
    def _experts(self) -> Experts | None:
        return experts_of(self.model_types)

    def renamed(self, name: str) -> str:
        """What checkpoints call the tensor `name`."""
        return self._experts.renamed(name) if self._experts else name

    def pieces(self, row: TensorRecord) -> list[Piece]:
        """The linear layers that the quantised tensor `row` is elsewhere; none where their names are not known."""
        *stack, rows, _ = row.matrix.shape
        if not stack:
            return [Piece(module_of(self.renamed(row.name)), range(rows))]
        if self._experts is None or (self.layout.stacks and self._experts.stacked is None):
            return []
        holder, _, fused = self.renamed(row.name).rpartition(".")
        leaves = FUSED.get(fused, (fused,))
        found: list[Piece] = []
        for i, leaf in enumerate(leaves):
            chosen = range(rows * i // len(leaves), rows * (i + 1) // len(leaves))
            if self.layout.stacks:
                module = f"{holder.removesuffix('experts')}{self._experts.stacked}.{leaf}"
                found.append(Piece(module, chosen, range(stack[0]), stacked=True))
            else:
                name = self._experts.leaves[LEAVES.index(leaf)]
                found += [Piece(f"{holder}.{e}.{name}", chosen, range(e, e + 1)) for e in range(stack[0])]
        return found

    def refusal(self, row: TensorRecord) -> str | None:
        """Why it cannot hold the quantised tensor `row`, or no program would find that there; or None."""
        is_stack, one_by_one = len(row.shape) > 2, ONE_BY_ONE.search(row.name) is not None
        model = self.model_types[0] if self.model_types else "unknown"
        if row.transposed and not is_stack and not self.layout.conv1d:
            return "a Conv1D, where its programs take linear layers only"
        if (is_stack or one_by_one) and not self.layout.scheme.symmetric and not self.layout.expert_zero_points:
            return "experts with zero points, which its programs do not read"
        if one_by_one and self.layout.stacks and JOINED.isdisjoint(self.model_types):
            return f"experts one by one, which its programs do not stack in int4 for model type {model}"
        pieces = self.pieces(row)
        if not pieces:
            return f"a stack of experts, and for model type {model} no program is known to read them in int4"
        reasons = (self.layout.refusal(len(piece.rows), row.matrix.shape[-1]) for piece in pieces)
        return next((reason for reason in reasons if reason), None)


def module_of(name: str) -> str:
    """The module of a weight; of fused experts, which are parameters of theirs, the one that holds them."""
    return name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else name.rpartition(".")[0]
