"""What comes into the layers of a model, and into the linear layers inside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from converter.experts import Projection
from converter.quantize.gptq import Inputs, dampen


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside the hidden states; the same for every window of the same length."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states [B, T, D] behind `layer`."""
        found = layer(hidden, *self.args, **self.kwargs)
        y: Tensor = found if isinstance(found, Tensor) else found[0]
        return y


class Recorder(nn.Module):
    """In the place of a layer: keeps what it is called with, and gives the hidden states back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: its weights stay where they are

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states as they came."""
        self.__dict__.update(hidden=hidden, args=args, kwargs=kwargs)
        return hidden


class Sums:
    """What `Inputs` are the means of, batch by batch."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.gram = torch.zeros(columns, columns, device=device)
        self.drift: Tensor | None = torch.zeros_like(self.gram)
        self.tokens = 0

    def add(self, meant: Tensor, seen: Tensor) -> None:
        """A batch of what the original gives [T, K], and of what is seen behind quantised layers."""
        self.gram.addmm_(seen.T, seen)
        if self.drift is not None:  # experts that a router of their own leads may be given other tokens
            self.drift = self.drift.addmm_((meant - seen).T, seen) if meant.shape == seen.shape else None
        self.tokens += len(seen)

    def means(self) -> Inputs:
        """The whole, which is not to be added to any more."""
        for matrix in (self.gram, self.drift):
            if matrix is not None:
                matrix /= max(1, self.tokens)
        damping = dampen(self.gram) if self.tokens >= len(self.gram) else 0.0
        return Inputs(self.gram, damping, self.drift, self.tokens)


Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


class _Reached(Exception):  # noqa: N818 - no error: the way out of a layer
    pass


@contextmanager
def hooked(hook: Callable[[str], Hook], modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the `hook` of its name is called before each of `modules`."""
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(layer: nn.Module, names: Sequence[str], call: Call, hidden: Tensor) -> dict[str, Tensor]:
    """What comes into the linear layers `names` of `layer`, as rows of tokens; none where one is not called."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, args[0].flatten(0, -2))
            if len(found) == len(names):
                raise _Reached

        return hook

    linears: dict[str, Any] = {name: layer.get_submodule(name) for name in names}
    with suppress(_Reached), hooked(note, linears):
        call(layer, hidden)
    return {name: found.get(name, hidden.new_empty(0, linear.in_features)) for name, linear in linears.items()}


def shared_inputs(layer: nn.Module, linears: Mapping[str, nn.Linear], call: Call, hidden: Tensor) -> list[list[str]]:
    """The names of `linears` as they are called, those with the same input together; last those not called."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if seen and seen[-1][0] is args[0]:
                seen[-1][1].append(name)
            else:
                seen.append((args[0], [name]))

        return hook

    with hooked(note, linears):
        call(layer, hidden)
    called = [names for _, names in seen]
    return called + [[name] for name in linears if not any(name in names for names in called)]


def stages(layer: nn.Module, groups: Sequence[list[str]], most_bytes: int) -> Iterator[list[list[str]]]:
    """`groups` of names with the same input, in their order; together those whose inputs can be seen in one pass.

    Those are the experts of a projection, as many as have room for two fp32 matrices [K, K] each in `most_bytes`.
    """
    together: dict[str, list[list[str]]] = {}
    for names in groups:
        parent = names[0].rpartition(".")[0]
        experts = isinstance(layer.get_submodule(parent), Projection)
        together.setdefault(parent if experts else names[0], []).append(names)
    for stage in together.values():
        linear: Any = layer.get_submodule(stage[0][0])
        count = max(1, most_bytes // (8 * linear.in_features**2))
        yield from (stage[start : start + count] for start in range(0, len(stage), count))
