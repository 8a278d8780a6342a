"""Which way round a source stores its matrices: [out, in] as linear layers of torch are, or [in, out]."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from formats.layout import TensorSpec
from formats.selection import is_conv1d, is_fused_experts

HIDDEN_SIZES = ("hidden_size", "d_model", "moe_hidden_size", "moe_latent_size")  # of what experts take and give
INNER_SIZE = re.compile(r"(intermediate|ffn_hidden)_size$")  # of what they have between

Sizes = tuple[int, int]  # hidden, and twice the inner one


def orientations(tensors: Mapping[str, TensorSpec], config: dict[str, Any] | None) -> dict[str, bool | None]:
    """Of each Conv1D and each stack of fused experts, whether it is stored [in, out]; None where nothing tells."""
    types = model_types(config)
    found: dict[str, bool | None] = {name: True for name in tensors if is_conv1d(name, types)}
    sizes = {pair for part in _parts(config or {}) for pair in _sizes_in(part)}
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in tensors.items():
        if is_fused_experts(name, spec):
            modules.setdefault(name.rpartition(".")[0], {})[name] = spec
    for stacks in modules.values():
        found |= dict.fromkeys(stacks, _orientation(stacks, sizes))
    return found


def model_types(config: dict[str, Any] | None) -> tuple[str, ...]:
    """The architectures that a configuration names, that of the whole model first."""
    return tuple(str(part["model_type"]) for part in _parts(config or {}) if "model_type" in part)


def _orientation(stacks: Mapping[str, TensorSpec], sizes: set[Sizes]) -> bool | None:
    """Whether the stacks of one module, which are all alike, are transposed.

    One way round they all have the same sizes. Where `gate_up_proj` stands beside `down_proj` only the right one does;
    elsewhere `sizes`, those of the configuration, tell.
    """
    read = {turned: {_sizes_of(name, spec, turned) for name, spec in stacks.items()} for turned in (False, True)}
    possible = [turned for turned, pairs in read.items() if len(pairs) == 1]
    if len(possible) > 1:
        possible = [turned for turned in possible if read[turned] <= sizes]
    return possible[0] if len(possible) == 1 else None


def _sizes_of(name: str, spec: TensorSpec, turned: bool) -> Sizes:
    """The sizes of the experts that a stack is of."""
    _, rows, columns = (spec.turned if turned else spec).shape
    if name.endswith("down_proj"):
        return rows, 2 * columns
    return columns, rows if name.endswith("gate_up_proj") else 2 * rows


def _sizes_in(config: dict[str, Any]) -> Iterator[Sizes]:
    """The sizes that one part of a configuration names."""
    numbers = {name: value for name, value in config.items() if type(value) is int}
    for hidden in HIDDEN_SIZES:
        for name, inner in numbers.items():
            if hidden in numbers and INNER_SIZE.search(name):
                yield numbers[hidden], 2 * inner


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those inside it, as that of the text part of a model."""
    left = [config]
    while left:
        part = left.pop()
        yield part
        left += [value for value in part.values() if isinstance(value, dict)]
