"""Which parameters of a model come from which tensors of its checkpoint, by transformers' own name mapping."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Match:
    """What transformers makes of a name: parameters, there or not, by a `converter` with the `pattern` that matched."""

    targets: tuple[str, ...]
    converter: Any | None
    pattern: str


@dataclass(frozen=True)
class Origin:
    """What some parameters, most often one, come from: lists of `sources`, in the order in which they are joined."""

    targets: tuple[str, ...]
    converter: Any | None
    sources: dict[str, list[str]]  # by the pattern of the converter that they match; without one a single name

    @property
    def names(self) -> list[str]:
        """All of the sources."""
        return [name for names in self.sources.values() for name in names]

    def tensors(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters by their names, of what is `read` by name; raises whatever transformers makes of it."""
        if self.converter is None:
            return {self.targets[0]: read(next(iter(self.sources)))}
        converter = deepcopy(self.converter)  # it collects what it converts
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.targets[0], name, pattern, partial(read, name))
        found = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class NameMapping:
    """The renamings and conversions that transformers has for `model`, with those that its `quantizer` adds."""

    def __init__(self, model: Any, quantizer: Any = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        conversions = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.held = model.state_dict()

    def find(self, name: str) -> Match:
        """What becomes of the tensor `name`."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.held)
        if target not in self.held and name in self.held:  # as transformers itself has it
            target, pattern = rename_source_key(name, [], [], self._prefix, self.held)
        if pattern is None:
            return Match((target,), None, name)
        converter = next(one for one in self._converters if pattern in one.source_patterns)
        first, *others = converter.target_patterns
        return Match((target, *(target.replace(first, other, 1) for other in others)), converter, pattern)


def origins(model: Any, names: Iterable[str]) -> list[Origin]:
    """Where the parameters of `model` come from, of a checkpoint that holds `names`."""
    from transformers.core_model_loading import dot_natural_key

    mapping = NameMapping(model)
    found: dict[str, Origin] = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which transformers stacks experts
        match = mapping.find(name)
        patterns = [] if match.converter is None else match.converter.source_patterns
        empty = Origin(match.targets, match.converter, {pattern: [] for pattern in patterns})
        found.setdefault(match.targets[0], empty).sources.setdefault(match.pattern, []).append(name)
    return list(found.values())
