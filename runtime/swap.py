"""Int4 in the place of a parameter: the weight of a linear layer, or the matrices of fused experts."""

from collections.abc import Container

import torch
from torch import nn

from formats.layout import PACKED, Scheme
from formats.tensors import TORCH_DTYPES
from runtime.experts import Int4Experts, Stack, hold_stack
from runtime.linear import SUFFIXES, Int4Linear


def swap(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    scheme: Scheme,
    *,
    transposed: bool,
    dtype: torch.dtype,
    scale_dtype: str,
    activations: str | None = None,
) -> None:
    """Make the parameter `name` of `module`, [N, K] or a stack [E, N, K] in `shape`, an int4 one on meta.

    A linear layer gives way to an `Int4Linear` of type `dtype` with its bias; a module of experts stays, and may mean
    `transposed` matrices, and so does a kind of linear layer with a forward of its own, which reads the weight.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if is_plain_linear(owner):
        rows, columns = shape
        layer = Int4Linear(columns, rows, scheme, bias=False, dtype=dtype, device="meta", activations=activations)
        layer.weight_scale = layer.weight_scale.to(TORCH_DTYPES[scale_dtype])
        layer.bias = owner._parameters.get("bias")
        module.set_submodule(path, layer.train(owner.training))
    else:
        stack = Stack(scheme, shape[-1], transposed, dtype)
        hold_stack(owner, leaf, stack, scheme.stored(leaf, shape, scale_dtype))


def shape_in(owner: nn.Module, leaf: str, *, transposed: bool) -> tuple[int, ...] | None:
    """[N, K] or [E, N, K] of what could be int4 at `leaf` of `owner`, or is so already; None if nothing could."""
    if isinstance(owner, Int4Linear):
        return owner.rows, owner.columns
    if isinstance(owner, Int4Experts) and (stack := owner.int4_stacks.get(leaf)):
        *experts, rows, _ = getattr(owner, leaf + PACKED).shape
        return (*experts, rows, stack.columns)
    weight = owner._parameters.get(leaf)
    linear = is_conv1d(owner) if transposed else isinstance(owner, nn.Linear)
    if weight is None or not (weight.dim() == 3 or linear):
        return None
    return tuple(weight.mT.shape if transposed else weight.shape)


def type_in(module: nn.Module, name: str) -> torch.dtype:
    """The type of the parameter `name` of `module`, or in which its code sees what is int4 there already."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, Int4Linear):
        return owner.weight_dtype
    if isinstance(owner, Int4Experts) and (stack := owner.int4_stacks.get(leaf)):
        return stack.dtype
    return owner.get_parameter(leaf).dtype


def is_plain_linear(module: nn.Module) -> bool:
    """Whether an `Int4Linear` computes what `module` does; what only derives from a linear layer may do otherwise."""
    return isinstance(module, Int4Linear) or is_conv1d(module) or type(module).forward is nn.Linear.forward


def is_part(name: str, names: Container[str]) -> bool:
    """Whether `name` is one of the tensors that stand for an int4 one, the packed words of which are among `names`.

    Its end alone does not tell: models have parameters of their own that are called `logit_scale`.
    """
    return any(name.endswith(suffix) and name.removesuffix(suffix) + PACKED in names for suffix in SUFFIXES)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, a linear layer with a weight [K, N]; without importing that."""
    return type(module).__name__ == "Conv1D"
