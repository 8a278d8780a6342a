"""`Int4Linear`: a linear layer whose weight lies in the format's own tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from formats.codec import Quantized, quantize
from formats.errors import UsageError
from formats.layout import PACKED, SCALE, ZERO_POINT, Scheme, stored_tensors
from formats.tensors import TORCH_DTYPES, spec_of
from runtime.ops import dequantized, in_format, int4_linear, linear, on_hopper

SUFFIXES = (PACKED, SCALE, ZERO_POINT)
ACTIVATIONS = (None, "fp8")


class Int4Linear(nn.Module):
    """y = x · Ŵᵀ + bias with Ŵ [N, K] = (code − zero) · scale; `state_dict` holds exactly what the format stores.

    `dtype` is that of the source weight and the bias; x may be fp16 or bf16 (fp32 too, by way of the dequantised
    weight), with any leading dimensions. Gradients reach x and the bias; the weight is not trainable.

    `activations="fp8"` rounds x to e4m3 with one scale a token (`runtime.activations`) in calls of many tokens, where
    arithmetic decides the time: on an H200 1.2 to 1.6 times as fast as a bf16 layer with 2048 tokens, at the price of
    other numbers. Raises `UsageError` for another name.

    `rows` and `columns` are those of the weight that is held: fewer than `out_features` and `in_features` where tensor
    parallelism gave each process a part.

    On a GPU whose kernels want another order of the same bits, `arrange` puts `weight_packed` and `weight_scale` into
    it; loading, `quantize_` and moving to a device do so by themselves.
    """

    _hf_quantized_needs_local_tp = True  # of transformers: with tensor parallelism the forward takes plain tensors

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    sibling: "Callable[[Int4Linear, Tensor], Tensor | None] | None" = None  # of a layer that `siblings.join` joined

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        activations: str | None = None,
    ) -> None:
        super().__init__()
        if activations not in ACTIVATIONS:
            raise UsageError(
                f"activations {activations!r} is not known; expected one of {', '.join(map(repr, ACTIVATIONS))}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rows, self.columns = out_features, in_features
        self.scheme = scheme
        self.activations = activations
        self.weight_dtype = dtype
        weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")
        stored = stored_tensors("weight", spec_of(weight), scheme)
        for suffix in SUFFIXES:
            spec = stored.get(f"weight{suffix}")
            empty = None if spec is None else torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
            self.register_buffer(f"weight{suffix}", empty)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme, activations: str | None = None) -> "Int4Linear":
        """The int4 form of `linear`, by the codec's absmax scales, sharing its bias.

        Raises `NonFiniteError` on NaN or infinity.
        """
        weight = linear.weight.detach()
        layer = cls(
            linear.in_features, linear.out_features, scheme,
            bias=False, dtype=weight.dtype, device="meta", activations=activations,
        )  # fmt: skip
        quantized = quantize(weight, scheme, layer.weight_scale.dtype)
        layer.hold(quantized)
        layer.bias = linear.bias
        layer.arrange()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in the type of x; raises `ValueError` for another number of columns, or integers."""
        if x.shape[-1] != self.columns or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} with {x.shape[-1]} columns, the layer takes {self.columns} of floats")
        y = None if self.sibling is None else self.sibling(self, x)
        return self.product(x, self.bias) if y is None else y

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x · Ŵᵀ + `bias` by the layer itself."""
        matrix: tuple[Any, ...] = tuple(self._buffers.values())  # as attributes they would cost the host 2 µs
        # Past torch's dispatcher where nothing is traced and no gradient wanted: it costs the host as much as a launch.
        plain = type(x) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        product: Callable[..., Tensor] = linear if plain and matrix[0].dim() == 3 else int4_linear
        return product(x, *matrix, bias, self.scheme.group_size, self.activations == "fp8")

    @property
    def arranged(self) -> bool:
        """Whether the weight is in the order of the GPU's kernels."""
        return self.weight_packed.dim() == 3

    @property
    def quantized(self) -> Quantized:
        """The weight in the format's tensors, whatever order it is in."""
        return in_format(Quantized(self.weight_packed, self.weight_scale, self.weight_zero_point), self.columns)

    @property
    def weight(self) -> Tensor:
        """Ŵ [N, K] in the type of the source, made anew each time: for models that look at the weight itself."""
        return self.dequantize(self.weight_dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ŵ [N, K] as `dtype`."""
        return dequantized(self.quantized, self.columns, self.scheme, dtype)

    def arrange(self) -> None:
        """Put the weight into the order of the kernels of its GPU, if they want one of their own."""
        scale = self.weight_scale
        if not self.arranged and on_hopper(scale.device):
            from runtime.kernels.hopper import takes
            from runtime.repack import arrange

            if takes(self.rows, self.columns, self.scheme, scale.dtype):
                self.hold(arrange(self.quantized))
                torch.cuda.synchronize(scale.device)  # kernels fetch weights before they wait for other kernels

    def restore(self) -> None:
        """Put the weight back into the order of the format, and leave the siblings."""
        self.sibling = None
        self.hold(self.quantized)

    def hold(self, matrix: Quantized) -> None:
        """Take the tensors of `matrix`, of the layer's own sizes, in either order."""
        self.weight_packed, self.weight_scale = matrix.packed, matrix.scale
        self.weight_zero_point = matrix.zero_point

    def _in_format(self) -> dict[str, Tensor]:
        return {f"weight{suffix}": tensor for suffix, tensor in zip(SUFFIXES, self.quantized.tensors(), strict=False)}

    def extra_repr(self) -> str:
        """Sizes and scheme, for print(model)."""
        kind = "sym" if self.scheme.symmetric else "asym"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.scheme.group_size}, {kind}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Int4Linear":
        self.restore()
        scale = self.weight_scale
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:  # model.half(): codes were computed from the scales as stored
            self.weight_scale = scale.to(self.weight_scale.device)
        self.arrange()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: in the order of the format, because another device may read it."""
        return {**self.__dict__, "_buffers": {**self._buffers, **self._in_format()}, "sibling": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.arrange()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.arranged:
            destination.update({prefix + name: tensor for name, tensor in self._in_format().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        self.arrange()
