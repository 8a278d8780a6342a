"""Launches of the Hopper kernels, at a fraction of what Triton's own cost the host.

Triton works out at every call what a kernel has to be compiled for. Here the caller knows: the device, the type of the
tokens, the sizes of boxes and the constants say it all, because no integer is specialised and every tensor starts at
16 bytes. All kernels are launched while the one before runs (programmatic dependent launch): each has to wait for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@dataclass(slots=True)
class Box:
    """What the copy engine is to bring of a tensor: a descriptor that Triton's launcher reads without checks."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any
    padding: str = "zero"
    round_f32_to_tf32: bool = False

    def checked(self) -> TensorDescriptor:
        """The same as Triton wants it for compiling."""
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.block_shape), self.layout)


class Launcher:
    """A kernel with its compiled forms."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, ...], x: Tensor, args: tuple[Any, ...], constants: dict[str, Any], **options: Any
    ) -> None:
        """Run on the device of `x`; `args` before `constants` are the kernel's arguments in their order."""
        device = x.device.index
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(grid, x, args, constants, **options)
        boxes = [arg.block_shape for arg in args if type(arg) is Box]
        key = (device, x.dtype, *boxes, *constants.values(), *options.values())
        compiled = self.compiled.get(key)
        if compiled is None:
            args = tuple(arg.checked() if type(arg) is Box else arg for arg in args)
            self.compiled[key] = self.kernel[grid](*args, **constants, **options, launch_pdl=True)
        else:
            whole_grid = (*grid, 1, 1)
            compiled[whole_grid](*args, *constants.values())
