"""Fused experts of transformers taken apart into linear layers, so that calibration sees what comes into each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Projection(nn.ModuleList):
    """The linear layers that a projection is, one an expert: none of them waits for another."""


class LinearExperts(nn.Module):
    """What a module of `fused` experts does, by linear layers; of that module there is left what they have between.

    It describes itself as transformers' `use_experts_implementation` has it. `routes` int64 [M, chosen] are the experts
    that each token went to last; `forced`, where given, takes the place of what the router says.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.first = first_projection(fused)
        for name in (self.first, "down_proj"):
            self.add_module(name, projection(fused, name))
        self.between = fused
        self.routes: Tensor | None = None
        self.forced: Tensor | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ over the chosen experts e of weight[e] · expert e(x): x [M, K], index and weights [M, chosen] → [M, K]."""
        self.routes = top_k_index if self.forced is None else self.forced
        into: Any = self.get_submodule(self.first)
        out: Any = self.down_proj
        between: Any = self.between
        y = torch.zeros_like(hidden_states)
        for expert in range(len(into)):
            tokens, choice = torch.where(self.routes == expert)
            x = into[expert](hidden_states[tokens])
            x = out[expert](between._apply_gate(x) if between.has_gate else between.act_fn(x))
            if getattr(between, "has_post_expert_norm", False):
                x = between.post_expert_norm(x)
            y.index_add_(0, tokens, (x * top_k_weights[tokens, choice, None]).to(y.dtype))
        return y


def first_projection(fused: Any) -> str:
    """The name of what the input of experts comes into."""
    return "gate_up_proj" if getattr(fused, "has_gate", True) else "up_proj"


def is_fused(module: nn.Module) -> bool:
    """Whether `module` is one of experts that can be taken apart."""
    held = module._parameters
    stacks = [held.get(name) for name in (first_projection(module), "down_proj")]
    return hasattr(module, "is_transposed") and all(stack is not None and stack.dim() == 3 for stack in stacks)


def take_apart(layer: nn.Module) -> None:
    """Put `LinearExperts` in the place of all fused experts of `layer`."""
    for name, module in list(layer.named_modules()):
        if name and is_fused(module):
            layer.set_submodule(name, LinearExperts(module))


def projection(fused: Any, name: str) -> Projection:
    """The linear layers of the stack `name`, [E, N, K] or [E, K, N], which `fused` is left without."""
    weights, biases = fused._parameters.pop(name).data, fused._parameters.pop(f"{name}_bias", None)
    if fused.is_transposed:
        weights = weights.mT.contiguous()
    _, rows, columns = weights.shape
    layers = [nn.Linear(columns, rows, bias=biases is not None, device="meta") for _ in weights]
    for i, layer in enumerate(layers):
        layer.weight = nn.Parameter(weights[i], requires_grad=False)
        if biases is not None:
            layer.bias = nn.Parameter(biases.data[i], requires_grad=False)
    return Projection(layers)


@contextmanager
def same_routes(layer: nn.Module, other: nn.Module) -> Iterator[None]:
    """Inside, each expert of `layer` gets the tokens that the same expert of `other` got last."""
    mine, theirs = ([m for m in one.modules() if isinstance(m, LinearExperts)] for one in (layer, other))
    for experts, leading in zip(mine, theirs, strict=True):
        experts.forced = leading.routes
    try:
        yield
    finally:
        for experts in mine:
            experts.forced = None
