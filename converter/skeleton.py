"""The model that calibration runs, built through transformers with its parameters on meta: a form without weights."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formats.architecture import BUILDING, architecture_of, cannot_build, with_plain_attention


def build(folder: Path, otherwise: str) -> Any:
    """The transformers model of `folder` in fp32, in evaluation mode, its parameters on meta; none of its code is run.

    Raises `UsageError` without transformers and `CheckpointError` where they cannot build it, with what to do
    `otherwise`.
    """
    architecture, config = architecture_of(folder, otherwise)
    try:
        with BUILDING, parameters_on_meta():
            make = partial(architecture._from_config, config, dtype=torch.float32)
            return with_plain_attention(make).eval()
    except Exception as error:  # a configuration is data from outside: whatever transformers makes of it
        raise cannot_build(folder, error, otherwise) from None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, parameters land on meta as this thread registers them, while buffers are computed for real.

    So tables such as rotary frequencies, which no checkpoint holds, are right without knowing any of them (the method
    is that of accelerate's init_empty_weights).
    """
    register = nn.Module.register_parameter
    thread = threading.get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta and threading.get_ident() == thread:
            empty = torch.empty_like(param, device="meta")
            self._parameters[name] = nn.Parameter(empty, requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
