"""Calibration: quantise decoder layers one after the other, by the inputs that a text gives them.

Two streams of hidden states go through the model. One is that of the original; the other comes from the layers that are
quantised already, because that is what the next layer will get. Of the model only one layer, twice, is in memory.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from converter.plan import Plan
from converter.prepared import Prepared, PreparedLayers
from converter.quantize import CALIBRATED
from converter.quantize.gptq import Inputs, dampen
from converter.quantize.search import search
from converter.source import Source
from formats.codec import dequantize
from formats.errors import CheckpointError
from formats.layout import scale_dtype_for
from formats.selection import WEIGHT
from formats.skeleton import build, first_line
from formats.tensors import TORCH_DTYPES

BATCH_TOKENS = 4096  # in a forward pass of a layer


@dataclass(frozen=True)
class LayerReport:
    """A layer that is done: its place, its mean output error, and what went by `search`.

    Those are the matrices that had too few tokens, and those that are no linear layers of torch: stacks and Conv1D.
    """

    index: int
    count: int
    output_error: float
    too_few: tuple[str, ...]
    other: tuple[str, ...]


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


class Calibration:
    """The walk through the decoder layers of `source`, with what `plan` says of their weights."""

    def __init__(self, source: Source, plan: Plan, device: torch.device) -> None:
        self.source = source
        self.method = CALIBRATED[plan.recipe.method]
        self.scheme = plan.recipe.scheme
        self.device = device
        quantized = [tensor for tensor in plan.tensors if tensor.quantized]
        self.other = [tensor.name for tensor in quantized if len(tensor.spec.shape) != 2 or tensor.transposed]
        matrices = {tensor.name for tensor in quantized} - set(self.other)
        otherwise = "convert it without --calibration"
        self.model: Any = build(source.folder, torch.float32, stored=torch.float32, otherwise=otherwise)
        self.prefix, self.layers = decoder_layers(self.model, matrices)
        self.matrices = {name for name in matrices if name.startswith(self.prefix)}

    @torch.no_grad()
    def run(self, windows: Tensor, prepared: PreparedLayers) -> Iterator[LayerReport]:
        """Quantise every layer that `prepared` lacks by the inputs that `windows` [W, T] of tokens give it."""
        calls, original = self.start(windows)
        current = list(original)
        for index in range(len(self.layers)):
            layer = self.filled(index)
            rounded = copy.deepcopy(layer)
            matrices, too_few = prepared.read_layer(index), list[str]()
            if matrices is None:
                matrices, too_few = self.quantized(index, layer, rounded, calls[index], original, current)
                prepared.write_layer(index, matrices)
            else:
                for name, matrix in matrices.items():
                    self.replace(rounded, index, name, matrix)
            layer.to(self.device)
            for i in range(len(original)):
                original[i] = self.forward(calls[index], layer, original[i])
                current[i] = self.forward(calls[index], rounded, current[i])
            errors = [matrix.output_error for matrix in matrices.values()]
            other = tuple(name for name in self.other if name.startswith(f"{self.prefix}{index}."))
            yield LayerReport(index, len(self.layers), sum(errors) / max(1, len(errors)), tuple(too_few), other)

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
                f"{self.source.folder}: cannot be calibrated ({first_line(error)}); convert it without --calibration"
            ) from None
        base.to("meta")
        return calls, hidden[1:]

    def name_of(self, module: nn.Module) -> str:
        """The prefix of the names of `module` in the model."""
        return next((f"{name}." for name, found in self.model.named_modules() if found is module and name), "")

    def filled(self, index: int) -> nn.Module:
        """A layer with the weights of the source, on the device."""
        layer = copy.deepcopy(self.layers[index])
        self.fill(layer, f"{self.prefix}{index}.")
        return layer.to(self.device)

    def fill(self, module: nn.Module, prefix: str, outside: str | None = None) -> None:
        """Give `module`, whose names begin with `prefix`, the tensors of the source, but those that begin `outside`."""
        for name, place in [*module.named_parameters(), *module.named_buffers()]:
            full = prefix + name
            if outside is not None and full.startswith(outside):
                continue
            if full in self.source.shard_of:
                owner, _, leaf = name.rpartition(".")
                value = self.source.read(full).to(place.dtype)
                kind = nn.Parameter(value, requires_grad=False) if isinstance(place, nn.Parameter) else value
                setattr(module.get_submodule(owner), leaf, kind)
            elif place.is_meta:
                raise CheckpointError(
                    f"{self.source.folder}: lacks {full!r}, which its model has; cannot be calibrated"
                )

    def quantized(
        self,
        index: int,
        layer: nn.Module,
        rounded: nn.Module,
        call: Call,
        original: list[Tensor],
        current: list[Tensor],
    ) -> tuple[dict[str, Prepared], list[str]]:
        """The matrices of a layer, those first that come first in it, and which of them saw too few tokens.

        `rounded` takes each as it is done, so that those behind it see its errors.
        """
        prefix = f"{self.prefix}{index}."
        linears = {name: module for name, module in rounded.named_modules()
                   if isinstance(module, nn.Linear) and f"{prefix}{name}{WEIGHT}" in self.matrices}  # fmt: skip
        done: dict[str, Prepared] = {}
        too_few: list[str] = []
        for names in shared_inputs(rounded, linears, call, current[0][:1].to(self.device)):
            inputs = self.inputs(names[0], layer, rounded, call, original, current)
            for name in names:
                full = f"{prefix}{name}{WEIGHT}"
                weight = linears[name].weight.data
                spec = self.source.shards[self.source.shard_of[full]][full]
                scale_dtype = TORCH_DTYPES[scale_dtype_for(spec.dtype)]
                if inputs.tokens < weight.shape[1]:
                    too_few.append(full)
                    found = search(weight, self.scheme, scale_dtype)
                else:
                    found = self.method(weight, inputs, self.scheme, scale_dtype)
                values = dequantize(found, weight.shape[1], self.scheme)
                size = inputs.loss(weight).sum()
                error = (inputs.loss(values - weight).sum() / size).item() if size else 0.0
                done[full] = Prepared(found, error)
                linears[name].weight.data = values
        return done, too_few

    def inputs(
        self, name: str, layer: nn.Module, rounded: nn.Module, call: Call, original: list[Tensor], current: list[Tensor]
    ) -> Inputs:
        """What comes into the linear layer `name` of the original and of the rounded layer."""
        layer.to(self.device)
        columns: Any = rounded.get_submodule(name).in_features
        gram = torch.zeros(columns, columns, device=self.device)
        drift: Tensor | None = torch.zeros_like(gram)
        tokens = 0
        for before, now in zip(original, current, strict=True):
            x = input_of(layer, name, call, before.to(self.device))
            seen = input_of(rounded, name, call, now.to(self.device))
            gram.addmm_(seen.T, seen)
            if drift is not None:  # experts may be given other tokens: nothing to compare then
                drift = drift.addmm_((x - seen).T, seen) if x.shape == seen.shape else None
            tokens += len(seen)
        layer.to("cpu")  # room for what rounds
        for matrix in (gram, drift):
            if matrix is not None:
                matrix /= max(1, tokens)
        return Inputs(gram, dampen(gram) if tokens >= columns else 0.0, drift, tokens)

    def replace(self, rounded: nn.Module, index: int, full: str, matrix: Prepared) -> None:
        """Put the rounded values in the place of a weight."""
        linear: Any = rounded.get_submodule(full.removeprefix(f"{self.prefix}{index}.").removesuffix(WEIGHT))
        linear.weight.data = dequantize(matrix.quantized, linear.in_features, self.scheme).to(self.device)

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
            f"{type(model).__name__}: has no list of layers that holds the linear layers to quantise; "
            "convert it without --calibration"
        )
    return prefix, lists[prefix]


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


class _Reached(Exception):  # noqa: N818 - no error: the way out of a layer
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def input_of(layer: nn.Module, name: str, call: Call, hidden: Tensor) -> Tensor:
    """What comes into the module `name` of `layer`, as rows of tokens; none where it is not called."""

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    linear: Any = layer.get_submodule(name)
    handle = linear.register_forward_pre_hook(stop)
    try:
        call(layer, hidden)
    except _Reached as reached:
        return reached.x.flatten(0, -2)
    finally:
        handle.remove()
    return hidden.new_empty(0, linear.in_features)


def shared_inputs(layer: nn.Module, linears: dict[str, nn.Linear], call: Call, hidden: Tensor) -> list[list[str]]:
    """The names of `linears` as they are called, those with the same input together; last those not called."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if seen and seen[-1][0] is args[0]:
                seen[-1][1].append(name)
            else:
                seen.append((args[0], [name]))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    try:
        call(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    called = [names for _, names in seen]
    return called + [[name] for name in linears if not any(name in names for names in called)]
