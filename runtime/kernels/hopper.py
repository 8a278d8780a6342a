"""The Hopper kernels as one: which matrices they take, and which of them takes a call, by a table made by measuring."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from math import log
from typing import Any

import torch
from torch import Tensor

from formats.codec import Quantized
from formats.layout import Scheme
from runtime.kernels.hopper_batch import batch
from runtime.kernels.hopper_decode import decode
from runtime.kernels.hopper_fp8 import fp8
from runtime.kernels.hopper_prefill import prefill

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"decode": decode, "batch": batch, "prefill": prefill, "fp8": fp8}
TABLE_NAME = "hopper_h200.json"  # written by tests/bench/tune.py
ALIGNMENT = 8  # of rows and columns: the copy engine moves 16 bytes at a time
BLOCK_COLUMNS, TILE_COLUMNS = 64, 16
ONE_GROUP = 1 << 30


@dataclass(frozen=True)
class Entry:
    """The fastest kernel, and its options, for `tokens` or fewer in `activations` × a matrix [rows, columns]."""

    activations: str
    tokens: int
    rows: int
    columns: int
    kernel: str
    options: dict[str, int]


def takes(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether the kernels can run a matrix [rows, columns] with scales of type `dtype`."""
    return (
        dtype in (torch.bfloat16, torch.float16)
        and rows % ALIGNMENT == 0
        and columns % ALIGNMENT == 0
        and (scheme.groups(columns) == 1 or scheme.group_size % TILE_COLUMNS == 0)
    )


def hopper_product(x: Tensor, matrix: Quantized, bias: Tensor | None, group_size: int, *, fp8: bool = False) -> Tensor:
    """Contiguous x [M, K] · Ŵᵀ + bias → [M, N] for a matrix in kernel order with scales of the type of x.

    With `fp8` x is rounded to e4m3 on the way, which wants a symmetric matrix and groups of a multiple of 64 columns.
    """
    tokens, columns = x.shape
    kernel, options = choose(tokens, matrix.scale.shape[1], columns, "fp8" if fp8 else "bf16")
    group = ONE_GROUP if matrix.scale.shape[0] == 1 else group_size
    if x.data_ptr() % 16:
        x = x.clone()
    if bias is not None:
        bias = bias.to(x.dtype)
    return KERNELS[kernel](x, matrix.packed, matrix.scale, matrix.zero_point, bias, group, **options)


@lru_cache(maxsize=4096)
def choose(tokens: int, rows: int, columns: int, activations: str = "bf16") -> tuple[str, dict[str, Any]]:
    """Kernel and options for x [tokens, columns] and a matrix [rows, columns]: those of the nearest shape in the table.

    Of the entries for at least `tokens`, the smallest; a shape's distance is the ratio of its sides.
    """
    entries = [entry for entry in table() if entry.activations == activations]
    sizes = sorted({entry.tokens for entry in entries})
    size = next((size for size in sizes if size >= tokens), sizes[-1])
    near = min(
        (entry for entry in entries if entry.tokens == size),
        key=lambda entry: abs(log(entry.rows / rows)) + abs(log(entry.columns / columns)),
    )
    options = dict(near.options)
    if "splits" in options:  # every part of K needs a step
        options["splits"] = max(1, min(options["splits"], columns // (BLOCK_COLUMNS * options["step"])))
    return near.kernel, options


@cache
def table() -> tuple[Entry, ...]:
    """The measured entries."""
    raw = json.loads((files("runtime.kernels") / TABLE_NAME).read_text())
    return tuple(Entry(**entry) for entry in raw["entries"])
