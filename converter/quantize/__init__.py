"""Quantisation methods by name; each turns a matrix into the format's tensors on the device where it lies."""

from collections.abc import Callable

import torch
from torch import Tensor

from converter.quantize.absmax import absmax
from converter.quantize.gptq import Inputs, gptq, weighted_search
from converter.quantize.search import search
from formats.codec import Quantized
from formats.layout import Scheme

Method = Callable[[Tensor, Scheme, torch.dtype], Quantized]

CalibratedMethod = Callable[[Tensor, Inputs, Scheme, torch.dtype], Quantized]

METHODS: dict[str, Method] = {"absmax": absmax, "search": search}
CALIBRATED: dict[str, CalibratedMethod] = {"gptq": gptq, "search": weighted_search}
DEFAULT_METHOD = "search"
