"""Layers that share their input share one product: q, k and v of an attention, gate and up of an MLP.

`join` lays the weights of siblings one behind the other in one tensor, of which each layer keeps a view. The first
sibling that is called with an x computes the columns of all; the others, called with the same x, take theirs. One
launch does the work of three on a taller matrix, and the model's own code stays as it is.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from formats.layout import CODES_PER_WORD
from runtime.linear import Int4Linear

NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
KERNEL_ROWS = 16  # of a block in kernel order, which two layers cannot share
PATIENCE = 3  # products in a row with columns that nobody took, before siblings part

# While a compiler traces, the shape of this counts the changes of x in place, which Dynamo shows in no other way.
torch.library.define("int4::changes", "(Tensor x) -> Tensor")
torch.library.impl("int4::changes", "default", lambda x: x.new_empty(0))
torch.library.register_fake("int4::changes", lambda x: x.new_empty(x._version))


class Kept(NamedTuple):
    """A product that siblings still wait for, and what it was made of."""

    x: Tensor
    stamp: tuple[int, ...]
    columns: tuple[Tensor, ...]
    waiting: frozenset[int]


class Siblings:
    """The weights of a group as one layer, and the last product as long as a sibling waits for its columns.

    `kept` is replaced whole, so threads that meet here compute a product twice, or part, at worst.
    """

    def __init__(self, joint: Int4Linear, rows: Sequence[int], biases: Sequence[Tensor]) -> None:
        self.joint = joint
        self.rows = list(rows)
        self.others = [frozenset(range(len(rows))) - {index} for index in range(len(rows))]
        self.biases = tuple(biases)
        self.made_of = (*joint.buffers(), *biases)
        self.kept: Kept | None = None
        self.missed = 0

    def columns(self, index: int, x: Tensor) -> Tensor | None:
        """Those of sibling `index` in the product of `x`; None once it is plain that the siblings share no input."""
        kept, stamp = self.kept, self._stamp(x)
        if kept is not None and kept.x is x and kept.stamp == stamp and index in kept.waiting:
            columns, waiting = kept.columns, kept.waiting & self.others[index]
        else:
            if kept is not None:
                self.kept = None
                self.missed += 1
                if self.missed >= PATIENCE:
                    return None
            y = self.joint.product(x, torch.cat(self.biases) if self.biases else None)
            columns, waiting = torch.split_with_sizes(y, self.rows, -1), self.others[index]
        if waiting:
            self.kept = Kept(x, stamp, columns, waiting)
        else:
            self.kept, self.missed = None, 0
        return columns[index]

    def _stamp(self, x: Tensor) -> tuple[int, ...]:
        """Differs with the thread, from inside to outside of a CUDA graph, and where torch counts a change in place."""
        if torch.compiler.is_compiling():
            return (~torch.ops.int4.changes(x).shape[0],)  # negative: never that of a product made elsewhere
        versions = [0 if tensor.is_inference() else tensor._version for tensor in (x, *self.made_of)]
        return threading.get_ident(), x.is_cuda and torch.cuda.is_current_stream_capturing(), *versions


@dataclass(frozen=True, eq=False)
class Sibling:
    """What a joined layer holds: its place in the group, and its own tensors as they were joined."""

    group: Siblings
    index: int
    tensors: tuple[Tensor | None, ...]

    def __call__(self, layer: Int4Linear, x: Tensor) -> Tensor | None:
        """The product of `layer` and x out of the joint one, or None if the layer is to compute its own.

        It does so where gradients are wanted, and as long as one of its tensors is replaced.
        """
        if not self.holds(layer):
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.group.biases)):
            return None
        y = self.group.columns(self.index, x)
        if y is None:
            layer.sibling = None
        return y

    def holds(self, layer: Int4Linear) -> bool:
        """Whether `layer` still has the tensors with which it was joined."""
        return all(map(is_, _tensors(layer), self.tensors))


def join(module: nn.Module, *, gpu_only: bool = False) -> int:
    """Join all siblings under `module` that can be, or those on a GPU alone; returns the number of new groups.

    Siblings have the names in `NAMES` under one parent, and the same columns, scheme, types, order and device. The
    results agree with those of single layers to rounding: another kernel may add in another order. Columns of a
    product of several tokens are not contiguous. A layer that is moved, loaded, copied or given other tensors is on
    its own; `join` takes it in again. Siblings whose inputs turn out to differ part.

    They must be called in one CUDA stream. In inference mode torch does not count changes in place: a model that
    changes an input between two siblings there must not be joined.
    """
    groups = [layers for layers in _groups(module) if layers[0].weight_scale.is_cuda or not gpu_only]
    for layers in groups:
        _join(layers)
    return len(groups)


def _groups(module: nn.Module) -> Iterator[list[Int4Linear]]:
    seen: set[Int4Linear] = set()
    for parent in module.modules():
        for names in NAMES:
            layers = [child for name in names if isinstance(child := parent._modules.get(name), Int4Linear)]
            if len({*layers} - seen) == len(names) and _fit(layers) and not _joined(layers):
                seen.update(layers)
                yield layers


def _fit(layers: Sequence[Int4Linear]) -> bool:
    """Whether the weights of `layers` can lie in one tensor."""
    kinds = {
        (
            layer.columns, layer.scheme, layer.activations, layer.weight_dtype, layer.arranged,
            layer.weight_scale.dtype, layer.weight_scale.device,
            None if layer.bias is None else (layer.bias.dtype, layer.bias.device),
        )
        for layer in layers
    }  # fmt: skip
    one = layers[0]
    unit = KERNEL_ROWS if one.arranged else 1 if one.scheme.symmetric else CODES_PER_WORD
    return len(kinds) == 1 and all(layer.rows % unit == 0 for layer in layers)


def _joined(layers: Sequence[Int4Linear]) -> bool:
    siblings = [layer.sibling for layer in layers if isinstance(layer.sibling, Sibling) and layer.sibling.holds(layer)]
    return len(siblings) == len(layers) and len({sibling.group for sibling in siblings}) == 1


def _join(layers: Sequence[Int4Linear]) -> None:
    """Tensor by tensor, so that hardly more than one of a group's is in memory twice."""
    one, rows = layers[0], [layer.rows for layer in layers]
    joint = Int4Linear(
        one.columns, sum(rows), one.scheme,
        bias=False, dtype=one.weight_dtype, device="meta", activations=one.activations,
    )  # fmt: skip
    for name in [name for name, tensor in one._buffers.items() if tensor is not None]:
        across = 1 if one.arranged and name != "weight_packed" else 0  # in kernel order the rest is [G, N]
        parts = [layer.get_buffer(name) for layer in layers]
        whole = torch.cat(parts, across)
        setattr(joint, name, whole)
        views = torch.split_with_sizes(whole, [part.shape[across] for part in parts], across)
        for layer, view in zip(layers, views, strict=True):
            setattr(layer, name, view)
    group = Siblings(joint, rows, [layer.bias for layer in layers if layer.bias is not None])
    for index, layer in enumerate(layers):
        layer.sibling = Sibling(group, index, _tensors(layer))


def _tensors(layer: Int4Linear) -> tuple[Tensor | None, ...]:
    return *layer._buffers.values(), layer.bias
