"""Calibration: quantise decoder layers one after the other, by the inputs that a text gives them.

Two streams of hidden states go through the model. One is that of the original; the other comes from the layers that are
quantised already, because that is what the next layer will get. Of the model only one layer, twice, is in memory; fused
experts are taken apart in it, so that all that is to be quantised is rows of linear layers.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from converter.experts import same_routes, take_apart
from converter.observe import Call, Recorder, Sums, inputs_of, shared_inputs, stages
from converter.parts import Part, is_linear, parts_of
from converter.plan import Plan
from converter.prepared import Prepared, PreparedLayers, Rounded, assembled
from converter.quantize import CALIBRATED
from converter.quantize.gptq import Inputs
from converter.quantize.search import search
from converter.skeleton import build
from converter.source import Source
from formats.architecture import first_line
from formats.codec import dequantize
from formats.errors import CheckpointError, Int4Error
from formats.layout import scale_dtype_for
from formats.mapping import origins
from formats.tensors import TORCH_DTYPES

BATCH_TOKENS = 4096  # in a forward pass of a layer
GRAM_BYTES = 4 << 30  # for what is kept of the inputs of experts that are seen at once

OTHERWISE = "convert it without --calibration"


@dataclass(frozen=True)
class LayerReport:
    """A layer that is done: its place, its mean output error, and what went by `search`.

    Those are the matrices that had too few tokens, and those that are no linear layers of torch: Conv1D, and experts
    that cannot be taken apart.
    """

    index: int
    count: int
    output_error: float
    too_few: tuple[str, ...]
    other: tuple[str, ...]


class Calibration:
    """The walk through the decoder layers of `source`, with what `plan` says of their weights."""

    def __init__(self, source: Source, plan: Plan, device: torch.device) -> None:
        self.source = source
        self.method = CALIBRATED[plan.recipe.method]
        self.scheme = plan.recipe.scheme
        self.device = device
        self.plans = {tensor.name: tensor for tensor in plan.tensors}
        self.model: Any = build(source.folder, OTHERWISE)
        self.origins = {target: origin for origin in origins(self.model, self.plans) for target in origin.targets}
        self.prefix, self.layers = decoder_layers(self.model, {
            target for target, origin in self.origins.items()
            if is_linear(self.model, target) and any(self.plans[name].quantized for name in origin.names)
        })  # fmt: skip

    @torch.no_grad()
    def run(self, windows: Tensor, prepared: PreparedLayers) -> Iterator[LayerReport]:
        """Quantise every layer that `prepared` lacks by the inputs that `windows` [W, T] of tokens give it."""
        calls, original = self.start(windows)
        current = list(original)
        for index in range(len(self.layers)):
            layer = self.filled(index)
            parts, other = self.parts(index, layer)
            rounded = copy.deepcopy(layer)
            matrices, too_few = prepared.read_layer(index), list[str]()
            if matrices is None:
                matrices, too_few = self.quantized(parts, layer, rounded, calls[index], original, current)
                prepared.write_layer(index, matrices)
            else:
                self.replace(rounded, parts, matrices)
            layer.to(self.device)
            for i in range(len(original)):
                original[i] = self.forward(calls[index], layer, original[i])
                current[i] = self.forward(calls[index], rounded, current[i])
            errors = [matrix.output_error for matrix in matrices.values()]
            mean = sum(errors) / max(1, len(errors))
            yield LayerReport(index, len(self.layers), mean, tuple(too_few), tuple(other))

    def start(self, windows: Tensor) -> tuple[list[Call], list[Tensor]]:
        """How each layer is called, and the hidden states before the first, in batches on the host."""
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        recorders = [Recorder(layer) for layer in self.layers]
        parent, _, name = self.prefix.rstrip(".").rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(recorders))
        self.fill(base, self.name_of(base), outside=self.prefix)
        size = max(1, BATCH_TOKENS // windows.shape[1])
        hidden = []
        try:
            base.to(self.device)
            for batch in (windows[:1], *torch.split(windows, size)):  # masks of one window serve any number
                base(input_ids=batch.to(self.device), use_cache=False)
                hidden.append(recorders[0].hidden.cpu())
                if len(hidden) == 1:
                    calls = [Call(recorder.args, recorder.kwargs) for recorder in recorders]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model's own code makes of it
            raise CheckpointError(
                f"{self.source.folder}: cannot be calibrated ({first_line(error)}); {OTHERWISE}"
            ) from None
        base.to("meta")
        return calls, hidden[1:]

    def name_of(self, module: nn.Module) -> str:
        """The prefix of the names of `module` in the model."""
        return next((f"{name}." for name, found in self.model.named_modules() if found is module and name), "")

    def filled(self, index: int) -> nn.Module:
        """A layer with the weights of the source, on the device, its experts taken apart."""
        layer = copy.deepcopy(self.layers[index])
        self.fill(layer, f"{self.prefix}{index}.")
        take_apart(layer)
        return layer.to(self.device)

    def fill(self, module: nn.Module, prefix: str, outside: str | None = None) -> None:
        """Give `module`, whose names begin with `prefix`, the tensors of the source, but those that begin `outside`."""
        values: dict[str, Tensor] = {}
        for name, place in [*module.named_parameters(), *module.named_buffers()]:
            full = prefix + name
            if outside is not None and full.startswith(outside):
                continue
            if full not in values:
                values |= self.values(full)
            if full in values:
                owner, _, leaf = name.rpartition(".")
                value = values.pop(full).to(place.dtype)
                if value.shape != place.shape:
                    raise CheckpointError(
                        f"{self.source.folder}: its tensors make {full!r} {list(value.shape)}, which its model expects "
                        f"{list(place.shape)}; are some experts missing? {OTHERWISE}"
                    )
                kind = nn.Parameter(value, requires_grad=False) if isinstance(place, nn.Parameter) else value
                setattr(module.get_submodule(owner), leaf, kind)
            elif place.is_meta:
                raise CheckpointError(
                    f"{self.source.folder}: lacks {full!r}, which its model has; cannot be calibrated"
                )

    def values(self, target: str) -> dict[str, Tensor]:
        """The parameter `target` of the model and those that come with it, where the source has them."""
        origin = self.origins.get(target)
        try:
            return {} if origin is None else origin.tensors(self.model, self.source.read)
        except Int4Error:
            raise
        except Exception as error:  # whatever transformers makes of it
            raise CheckpointError(
                f"{self.source.folder}: transformers cannot make {target!r} of its tensors ({first_line(error)}); "
                f"{OTHERWISE}"
            ) from None

    def parts(self, index: int, layer: nn.Module) -> tuple[dict[str, list[Part]], list[str]]:
        """What is to be quantised of the linear layers in `layer`, and the tensors that are nothing of the kind."""
        prefix = f"{self.prefix}{index}."
        inside = [origin for target, origin in self.origins.items()
                  if target.startswith(prefix) and target == origin.targets[0]]  # fmt: skip
        parts = parts_of(layer, prefix, inside, self.plans, self.source)
        reached = {part.source for found in parts.values() for part in found}
        names = {name for origin in inside for name in origin.names if self.plans[name].quantized}
        return parts, sorted(names - reached)

    def quantized(
        self,
        parts: dict[str, list[Part]],
        layer: nn.Module,
        rounded: nn.Module,
        call: Call,
        original: list[Tensor],
        current: list[Tensor],
    ) -> tuple[dict[str, Prepared], list[str]]:
        """The matrices of a layer, those first that come first in it, and which of them saw too few tokens.

        `rounded` takes each as it is done, so that those behind it see its errors.
        """
        linears: dict[str, Any] = {name: rounded.get_submodule(name) for name in parts}
        done: dict[str, dict[int | None, Rounded]] = {}
        too_few: list[str] = []
        groups = shared_inputs(rounded, linears, call, current[0][:1].to(self.device))
        for stage in stages(rounded, groups, GRAM_BYTES):
            gathered = self.inputs([names[0] for names in stage], layer, rounded, call, original, current)
            for names in stage:
                inputs = gathered.pop(names[0])
                for name in names:
                    for part in parts[name]:
                        rows = self.round(linears[name], part, inputs)
                        done.setdefault(part.source, {})[part.number] = rows
                        if inputs.tokens < linears[name].in_features:
                            too_few.append(part.name)
        return {name: assembled(matrices) for name, matrices in done.items()}, too_few

    def round(self, linear: nn.Linear, part: Part, inputs: Inputs) -> Rounded:
        """Quantise a part of `linear`, which takes its new values."""
        weight = linear.weight.data[part.rows]
        scale_dtype = TORCH_DTYPES[scale_dtype_for(self.plans[part.source].spec.dtype)]
        if inputs.tokens < weight.shape[1]:
            found = search(weight, self.scheme, scale_dtype)
        else:
            found = self.method(weight, inputs, self.scheme, scale_dtype)
        values = dequantize(found, weight.shape[1], self.scheme)
        size, lost = (inputs.tokens * inputs.loss(rows).sum().item() for rows in (weight, values - weight))
        linear.weight.data[part.rows] = values
        return Rounded(found, lost, size)

    def inputs(
        self,
        names: Sequence[str],
        layer: nn.Module,
        rounded: nn.Module,
        call: Call,
        original: list[Tensor],
        current: list[Tensor],
    ) -> dict[str, Inputs]:
        """What comes into the linear layers `names` of the original and of the rounded layer.

        Experts of the original get the tokens that those of the rounded layer get, so that they can be compared.
        """
        layer.to(self.device)
        columns: dict[str, Any] = {name: rounded.get_submodule(name).in_features for name in names}
        sums = {name: Sums(columns[name], self.device) for name in names}
        for before, now in zip(original, current, strict=True):
            seen = inputs_of(rounded, names, call, now.to(self.device))
            with same_routes(layer, rounded):
                meant = inputs_of(layer, names, call, before.to(self.device))
            for name in names:
                sums[name].add(meant[name], seen[name])
        layer.to("cpu")  # room for what rounds
        return {name: sums.pop(name).means() for name in names}

    def replace(self, rounded: nn.Module, parts: dict[str, list[Part]], matrices: dict[str, Prepared]) -> None:
        """Put the rounded values of `matrices` in the place of weights."""
        for name, found in parts.items():
            linear: Any = rounded.get_submodule(name)
            for part in found:
                matrix = matrices[part.source].matrix(part.number)
                linear.weight.data[part.rows] = dequantize(matrix, linear.in_features, self.scheme).to(self.device)

    def forward(self, call: Call, layer: nn.Module, hidden: Tensor) -> Tensor:
        """One batch through one layer; on the host before and after."""
        return call(layer, hidden.to(self.device)).cpu()


def decoder_layers(model: nn.Module, matrices: set[str]) -> tuple[str, nn.ModuleList]:
    """The list of layers that holds the most of `matrices`, the outermost of them, with the prefix of its names.

    Raises `CheckpointError` where there is none.
    """
    lists = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    held = {prefix: sum(matrix.startswith(prefix) for matrix in matrices) for prefix in lists}
    prefix = max(held, key=lambda name: held[name], default=None)
    if prefix is None or not held[prefix]:
        raise CheckpointError(
            f"{type(model).__name__}: has no list of layers that holds the linear layers to quantise; {OTHERWISE}"
        )
    return prefix, lists[prefix]
