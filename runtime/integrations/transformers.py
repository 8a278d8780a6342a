"""The quantisation method `i4` of transformers: `from_pretrained(folder, variant="i4")` gives int4 layers that stay so.

The interface is that of transformers' own quantisers (`transformers/quantizers/base.py`, 5.10 to 5.23). What is
quantised is read from the names in the shards; transformers' name mapping says which module each tensor is for.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from formats.errors import CheckpointError, UsageError, some
from formats.layout import CODES_PER_WORD, PACKED, SCALE, Scheme, TensorSpec, ceil_div
from formats.manifest import FORMAT_VERSION, QUANT_METHOD, quantization_config
from runtime.experts import Int4Experts, release_stack
from runtime.integrations.names import Targets, keeps_rows, read_headers, renames_weights, turns
from runtime.integrations.parts import as_buffers, as_parameters, check_part
from runtime.linear import SUFFIXES, Int4Linear
from runtime.siblings import join
from runtime.swap import is_conv1d, is_part, shape_in, swap

INITIALIZED = "_is_hf_initialized"  # what transformers marks tensors and modules with that have their values


class Int4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of an int4 checkpoint; `dequantize`, `activations` and `join` are for loading alone.

    `from_pretrained(folder, variant="i4", quantization_config=Int4Config(dequantize=True))` gives a model of plain
    layers in 16 bits; `activations` and `join` are those of `runtime.load`.

    Raises `CheckpointError` for another version of the format.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        bits: int = 4,
        group_size: int = 256,
        symmetric: bool = True,
        dequantize: bool = False,
        activations: str | None = None,
        join: bool | None = None,
        stored: Mapping[str, TensorSpec] | None = None,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION or bits != 4 or unknown.keys() - {"quant_method"}:
            raise CheckpointError(
                f"quantization_config: is of format version {format_version}, {bits} bits, with {sorted(unknown)}; "
                f"this program reads version {FORMAT_VERSION}: upgrade int4-convert"
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.dequantize = dequantize
        self.activations = activations
        self.join = join
        self.stored = stored  # the tensors of the checkpoint, where from_pretrained gets them from elsewhere than files

    @property
    def scheme(self) -> Scheme:
        """The scheme of the quantised tensors."""
        return Scheme(self.group_size, self.symmetric)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a caller of `from_pretrained` may choose."""
        return {name: getattr(self, name) for name in ("dequantize", "activations", "join", "stored")}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds, field by field as the format says."""
        return quantization_config(self.scheme)


class Int4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Puts int4 layers into the model before its weights come, and the order of the kernels into them afterwards."""

    requires_calibration = False
    serialized_names = {"weight": [f"weight{suffix}" for suffix in SUFFIXES]}  # noqa: RUF012 - as the base has it

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        self._swapped: dict[str, nn.Module] = {}  # the linear layers that int4 ones replace, by their paths
        stored = self.quantization_config.stored or read_headers(checkpoint_files)
        taken, kept = Targets(model, self).assign(stored)
        self._kinds = _kinds(model, kept - stored.keys())
        self._packed = {target + PACKED for target in taken}
        for target, name in taken.items():
            self._hold(model, target, name, stored)
        tied = getattr(model, "all_tied_weights_keys", {})
        for target, first in list(tied.items()):
            if target in taken or first in taken:  # a head of its own, whatever the configuration says
                del tied[target]
            if first in taken and target not in taken.keys() | kept:  # the same layer again, as in Zamba
                self._hold(model, target, taken[first], stored)
                tied |= {target + suffix: first + suffix for suffix in SUFFIXES if taken[first] + suffix in stored}

    def _hold(self, model: Any, target: str, name: str, stored: Mapping[str, TensorSpec]) -> None:
        """Make the module of the parameter `target` one that holds it as int4; `name` is in the checkpoint."""
        path, _, leaf = target.rpartition(".")
        owner = model.get_submodule(path)
        transposed = _is_transposed(target, owner, owner._parameters.get(leaf), stored[name + PACKED])
        shape = shape_in(owner, leaf, transposed=transposed)
        if shape is None:
            raise CheckpointError(
                f"tensor {name!r} is int4, {type(model).__name__} has a {type(owner).__name__} there; expected a "
                f"linear layer or fused experts: is it the same model? else convert it again with --exclude {name!r}"
            )
        chosen = self.quantization_config
        swap(model, target, shape, chosen.scheme, transposed=transposed, dtype=owner._parameters[leaf].dtype,
             scale_dtype=stored[name + SCALE].dtype, activations=chosen.activations)  # fmt: skip
        layer = model.get_submodule(path)
        if isinstance(layer, Int4Linear):
            self._swapped[path] = owner
            as_parameters(layer)
        else:
            setattr(owner, INITIALIZED, True)  # else transformers would draw weights, and throw them away

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        _refuse_random(model)
        for name, kind in self._kinds.items():
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(kind)
        hooked = False
        for path, layer in model.named_modules():
            if isinstance(layer, Int4Linear):
                as_buffers(path, layer)
                layer.arrange()
                hooked |= hasattr(layer, "_hf_hook") or hasattr(layer, "_is_hooked")  # moved about, or shared out
            elif isinstance(layer, Int4Experts):
                for name, stack in layer.int4_stacks.items():
                    held = {suffix: layer._parameters.get(name + suffix) for suffix in SUFFIXES}
                    check_part(f"{path}.{name}", held, stack.columns, stack.scheme)
        chosen = self.quantization_config
        if chosen.dequantize:
            self._dequantize(model)
        elif chosen.join is not False and not hooked:
            join(model, gpu_only=chosen.join is None)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # By its name it comes from the configuration of a model that was saved.
        kind: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for path, layer in list(model.named_modules()):
            if isinstance(layer, Int4Linear):
                plain: Any = self._swapped[path]
                weight = layer.dequantize(kind or layer.weight_dtype)
                weight = weight.T.contiguous() if is_conv1d(plain) else weight
                plain.weight = nn.Parameter(weight, requires_grad=False)
                plain.bias = layer.bias
                model.set_submodule(path, plain.train(layer.training))
            elif isinstance(layer, Int4Experts):
                for name, stack in list(layer.int4_stacks.items()):
                    release_stack(layer, name, kind or stack.dtype)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """The model's own conversions, and a copy of each for the packed words, the scales and the zero points."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        copies: list[Any] = []
        for conversion in weight_conversions:
            converts = isinstance(conversion, WeightConverter) and (keeps_rows(conversion) or turns(conversion))
            if not converts and not renames_weights(conversion):
                continue
            for suffix in SUFFIXES:
                sources, targets = (
                    [pattern.removesuffix("$") + suffix for pattern in patterns]
                    for patterns in (conversion._original_source_patterns, conversion._original_target_patterns)
                )
                if not converts or turns(conversion):  # what is stored has been turned already
                    copy = WeightRenaming(sources, targets)
                else:
                    copy = WeightConverter(sources, targets, operations=list(conversion.operations))
                copy.scope_prefix = conversion.scope_prefix
                copy.base_model_prefix = conversion.base_model_prefix
                copies.append(copy)
        self._patterns = {pattern for copy in copies for pattern in copy.target_patterns}
        return weight_conversions + copies

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for words and scales, which keep the type that they are stored in."""
        if any(is_part(name, self._packed) or is_part(name, self._patterns) for name in converter.target_patterns):
            return None
        return dtype

    def is_serializable(self) -> bool:
        """The state dict holds the format's own tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes are not."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The products are operators of torch."""
        return True


def _kinds(model: Any, renamed: set[str]) -> dict[str, torch.dtype]:
    """The types of the parameters in `renamed`, which transformers before 5.23 leaves in the type that is stored."""
    plan = model._get_dtype_plan(model.dtype)  # modules that stay in fp32, by patterns
    parameters = ((name, parameter) for name, parameter in model.named_parameters() if name in renamed)
    return {name: held.dtype for name, held in parameters if not any(re.search(pattern, name) for pattern in plan)}


def _is_transposed(target: str, owner: nn.Module, held: Tensor | None, packed: TensorSpec) -> bool:
    """Whether the model means its parameter `target` as [K, N] or [E, K, N], where `packed` has rows of N."""
    if held is None or held.dim() == 2:
        return is_conv1d(owner)
    if len(packed.shape) == 2:  # stored one by one, as transformers stacks them
        return False
    fits = [packed.shape[1:] == (rows, ceil_div(columns, CODES_PER_WORD))
            for rows, columns in (held.shape[1:], held.shape[:0:-1])]  # fmt: skip
    if not any(fits):
        raise CheckpointError(f"{target!r} is int4 words {list(packed.shape)}, the model expects {list(held.shape)}")
    if all(fits) and not hasattr(owner, "is_transposed"):
        raise CheckpointError(
            f"{target!r}: whether the model means {list(held.shape)} transposed cannot be told; convert it again with "
            f"--exclude {target!r}"
        )
    return bool(owner.is_transposed) if all(fits) else fits[1]


def _refuse_random(model: Any) -> None:
    """Raise `CheckpointError` if transformers drew values for what the checkpoint lacks.

    A new head may be random, and what the model says may be missing has the values that it gives it: Marian's table of
    sines.
    """
    body = f"{model.base_model_prefix}."
    parameters = dict(model.named_parameters())
    if any(held.is_meta for held in parameters.values()):
        raise UsageError(
            "device_map: puts a part of the model on the disk, from which int4 layers do not run; use a GPU or the CPU"
        )
    names = [name for name, held in parameters.items() if not getattr(held, INITIALIZED, False)]
    may_miss = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    names = [name for name in names if not any(pattern.search(name) for pattern in may_miss)]
    if drawn := [name for name in names if model.base_model is model or name.startswith(body)]:
        raise CheckpointError(
            f"{type(model).__name__} would be random where the checkpoint holds nothing: {some(drawn)}; is it the same "
            "model and version? fetch the checkpoint again"
        )


def register() -> None:
    """Make transformers know the method `i4`."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(Int4Config)
        auto.register_quantizer(QUANT_METHOD)(Int4Quantizer)
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (Int4Config,)
