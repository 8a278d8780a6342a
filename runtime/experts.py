"""Weights of modules that stay: stacks [E, N, K] of the matrices of fused experts, above all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from formats.codec import Quantized
from formats.layout import SCALE, Scheme, TensorSpec
from formats.tensors import TORCH_DTYPES
from runtime.linear import SUFFIXES
from runtime.ops import dequantized, int4_grouped_linear


@dataclass(frozen=True)
class Stack:
    """How a projection of E experts is held: K columns, and whether the model means [E, K, N] instead of [E, N, K].

    A matrix [N, K] of a module that is no plain linear layer is held in the same way.
    """

    scheme: Scheme
    columns: int
    transposed: bool
    dtype: torch.dtype


class Int4Experts(nn.Module):
    """Mixed into the class of a module of experts by `hold_stack`: its projections are int4, its state dict the format.

    Where that class describes itself as transformers' `use_experts_implementation` does, tokens are sorted by expert
    and one launch multiplies them by all experts' matrices; any other sees the dequantised weights as it reads them.
    """

    int4_stacks: dict[str, Stack]

    def __getattr__(self, name: str) -> Any:
        """A projection that the model's own code reads: Ŵ, made anew each time, in the orientation that it expects."""
        stack = self.__dict__.get("int4_stacks", {}).get(name)
        return super().__getattr__(name) if stack is None else self.dequantize(name, stack.dtype)

    def dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        """Ŵ of the projection `name` as `dtype`, [E, N, K] or [N, K], or [E, K, N] where the model means it so."""
        stack = self.int4_stacks[name]
        weight = dequantized(self.quantized(name), stack.columns, stack.scheme, dtype)
        return weight.mT.contiguous() if stack.transposed else weight

    def quantized(self, name: str) -> Quantized:
        """The stored tensors of the projection `name`."""
        return Quantized(*(getattr(self, name + suffix) for suffix in SUFFIXES))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the class, by int4 products where it can be."""
        first = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
        if not hasattr(self, "is_transposed") or not self.int4_stacks.keys() >= {first, "down_proj"}:
            return super().forward(*args, **kwargs)
        return self._mixed(first, *args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Int4Experts":
        scales = {name: self._parameters[name + SCALE] for name in self.int4_stacks}
        stored = {name: scale.data for name, scale in scales.items() if scale is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, stack in self.int4_stacks.items():
            scale = self._parameters[name + SCALE]
            if scale is not None and scale.dtype != stored[name].dtype:  # codes were computed from it as stored
                scale.data = stored[name].to(scale.device)
            dtype = fn(torch.empty(0, dtype=stack.dtype, device=stored[name].device)).dtype
            self.int4_stacks[name] = replace(stack, dtype=dtype)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy, which know classes by their names: this one is made anew."""
        return _revived, (type(self).__bases__[1],), self.__dict__.copy()

    def _mixed(self, first: str, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ over the chosen experts e of weight[e] · expert e(x): x [M, K], index and weights [M, chosen] → [M, K]."""
        chosen = top_k_index.shape[-1]
        expert, order = top_k_index.flatten().sort(stable=True)
        numbers = torch.arange(len(self.quantized(first).packed), device=expert.device, dtype=expert.dtype)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        y = self._product(first, hidden_states[order // chosen], expert, ends)
        y = self._apply_gate(y) if getattr(self, "has_gate", True) else self.act_fn(y)
        y = self._product("down_proj", y, expert, ends)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.flatten()[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return y[back].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """x [S, K] · Ŵ[expert]ᵀ + bias[expert] → [S, N]; rows stand in the order of their `expert` [S]."""
        matrix = self.quantized(name)
        group_size = self.int4_stacks[name].scheme.group_size
        y = int4_grouped_linear(x, ends, matrix.packed, matrix.scale, matrix.zero_point, group_size)
        bias = getattr(self, f"{name}_bias", None)
        if getattr(self, "_is_expert_parallel", False):  # tokens of other processes' experts stand last
            y = y.masked_fill((expert >= len(matrix.packed)).unsqueeze(-1), 0)
            expert = expert.clamp(max=len(matrix.packed) - 1)
        return y if bias is None else y + bias[expert]


def hold_stack(experts: nn.Module, name: str, stack: Stack, stored: dict[str, TensorSpec]) -> None:
    """Give `experts` the tensors `stored` for its projection `name`, on meta, in place of the parameter itself."""
    if not isinstance(experts, Int4Experts):
        kind: Any = type(experts)
        experts.__class__ = int4_class(kind)
    experts.__dict__.setdefault("int4_stacks", {})[name] = stack
    experts._parameters.pop(name, None)
    for leaf in (name + suffix for suffix in SUFFIXES):
        experts.register_parameter(leaf, None)
        if spec := stored.get(leaf):
            empty = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
            experts.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))


def release_stack(experts: Int4Experts, name: str, dtype: torch.dtype) -> None:
    """Give `experts` its projection `name` back as a parameter of type `dtype`."""
    weight = experts.dequantize(name, dtype)
    for suffix in SUFFIXES:
        experts._parameters.pop(name + suffix, None)
    del experts.int4_stacks[name]
    experts._parameters[name] = nn.Parameter(weight, requires_grad=False)
    if not experts.int4_stacks:
        experts.__class__ = type(experts).__bases__[1]


def _revived(kind: Any) -> nn.Module:
    """An empty module of the class `kind` with `Int4Experts` mixed in."""
    made: type[nn.Module] = int4_class(kind)
    return made.__new__(made)


@cache
def int4_class(kind: Any) -> Any:
    """`kind` with `Int4Experts` mixed in."""
    return type(f"Int4{kind.__name__}", (Int4Experts, kind), {"__doc__": Int4Experts.__doc__})
