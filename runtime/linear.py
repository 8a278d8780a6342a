"""`Int4Linear`: a linear layer whose weight lies in the format's own tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from formats.codec import Quantized, dequantize, quantize
from formats.layout import PACKED, SCALE, ZERO_POINT, Scheme, stored_tensors
from formats.tensors import TORCH_DTYPES, spec_of
from runtime.ops import int4_linear


class Int4Linear(nn.Module):
    """y = x · Ŵᵀ + bias with Ŵ [N, K] = (code − zero) · scale; `state_dict` holds exactly what the format stores.

    `dtype` is that of the source weight and the bias; x may be fp16 or bf16 (fp32 too, by way of the dequantised
    weight), with any leading dimensions. The weight is not trainable.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")
        stored = stored_tensors("weight", spec_of(weight), scheme)
        for suffix in (PACKED, SCALE, ZERO_POINT):
            spec = stored.get(f"weight{suffix}")
            empty = None if spec is None else torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
            self.register_buffer(f"weight{suffix}", empty)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> "Int4Linear":
        """The int4 form of `linear`, by the codec's absmax scales, sharing its bias.

        Raises `NonFiniteError` on NaN or infinity.
        """
        weight = linear.weight.detach()
        layer = cls(linear.in_features, linear.out_features, scheme, bias=False, dtype=weight.dtype, device="meta")
        quantized = quantize(weight, scheme, layer.weight_scale.dtype)
        layer.weight_packed, layer.weight_scale = quantized.packed, quantized.scale
        layer.weight_zero_point = quantized.zero_point
        layer.bias = linear.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in the type of x."""
        y: Tensor = int4_linear(
            x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.bias, self.scheme.group_size
        )
        return y

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ŵ [N, K] as `dtype`."""
        quantized = Quantized(self.weight_packed, self.weight_scale, self.weight_zero_point)
        return dequantize(quantized, self.in_features, self.scheme, dtype)

    def extra_repr(self) -> str:
        """Sizes and scheme, for print(model)."""
        kind = "sym" if self.scheme.symmetric else "asym"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.scheme.group_size}, {kind}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Int4Linear":
        # model.half() must not round the scales: codes were computed from them as stored.
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self
