"""Which rows of the linear layers of a model are which matrices of its source."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from converter.experts import Projection, is_fused
from converter.plan import TensorPlan
from converter.source import Source
from formats.mapping import Origin
from formats.selection import WEIGHT


@dataclass(frozen=True)
class Part:
    """A matrix of the source that is `rows` of a linear layer: the `number` of it, where its tensor is a stack."""

    source: str
    number: int | None
    rows: slice

    @property
    def name(self) -> str:
        """What to call it."""
        return self.source if self.number is None else f"{self.source}[{self.number}]"


def is_linear(model: nn.Module, target: str) -> bool:
    """Whether the parameter `target` of `model` is the weight of linear layers, fused or not."""
    path, _, leaf = target.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return False
    return leaf in owner._parameters and (isinstance(owner, nn.Linear) or is_fused(owner))


def linears_of(layer: nn.Module, target: str) -> dict[str, nn.Linear]:
    """The linear layers whose weights the parameter `target` of `layer` is, experts in their order."""
    path = target.removesuffix(WEIGHT)
    try:
        found = layer.get_submodule(path)
    except AttributeError:
        return {}
    if isinstance(found, Projection):
        return {f"{path}.{name}": module for name, module in found.named_children() if isinstance(module, nn.Linear)}
    # One with a forward of its own may do something else with its weight than multiply what comes in.
    if not isinstance(found, nn.Linear) or type(found).forward is not nn.Linear.forward or path == target:
        return {}
    return {path: found}


def parts_of(
    layer: nn.Module, prefix: str, origins: Sequence[Origin], tensors: Mapping[str, TensorPlan], source: Source
) -> dict[str, list[Part]]:
    """The parts that are to be quantised of the linear layers in `layer`, whose names begin with `prefix`.

    Where transformers changes `tensors` on their way into the model, stacking, joining and turning is followed, and
    each matrix is compared with its rows; where that fails there are no parts.
    """
    found: dict[str, list[Part]] = {}
    for origin in origins:
        linears = linears_of(layer, origin.targets[0].removeprefix(prefix))
        plans = [[tensors[name] for name in names] for names in origin.sources.values() if names]
        if len(origin.targets) == 1 and any(plan.quantized for list_ in plans for plan in list_):
            found |= _joined(linears, plans, source, certain=origin.converter is None)
    quantized = {name: [part for part in parts if tensors[part.source].quantized] for name, parts in found.items()}
    return {name: parts for name, parts in quantized.items() if parts}


def _joined(
    linears: Mapping[str, nn.Linear], plans: Sequence[Sequence[TensorPlan]], source: Source, *, certain: bool
) -> dict[str, list[Part]]:
    """What each of `linears` is, if it is a matrix of every one of the lists in `plans`, one below the other."""
    matrices = [[(plan, number) for plan in list_ for number in _numbers(plan)] for list_ in plans]
    if any(len(list_) != len(linears) for list_ in matrices):
        return {}
    found: dict[str, list[Part]] = {}
    values = [_values(list_, source) for list_ in plans]
    for i, (name, linear) in enumerate(linears.items()):
        rows = 0
        for list_, reader in zip(matrices, values, strict=True):
            plan, number = list_[i]
            part = Part(plan.name, number, slice(rows, rows + plan.matrix.shape[-2]))
            if not (certain and number is None) and not _same(linear.weight[part.rows], next(reader)):
                return {}
            found.setdefault(name, []).append(part)
            rows = part.rows.stop
        if rows != linear.out_features:
            return {}
    return found


def _numbers(plan: TensorPlan) -> Iterable[int | None]:
    """The numbers of the matrices in a stack, or None for one that is a tensor of its own."""
    return range(plan.spec.shape[0]) if len(plan.spec.shape) == 3 else (None,)


def _values(plans: Sequence[TensorPlan], source: Source) -> Iterator[Tensor]:
    """The matrices [N, K] of the source, one after the other."""
    for plan in plans:
        for matrix in source.matrices(plan.name):
            yield matrix.mT if plan.transposed else matrix


def _same(weight: Tensor, matrix: Tensor) -> bool:
    return weight.shape == matrix.shape and torch.equal(weight, matrix.to(weight))
