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

from formats.layout import Scheme
from runtime.kernels.hopper_batch import batch
from runtime.kernels.hopper_decode import decode
from runtime.kernels.hopper_prefill import prefill

Kernel = Callable[..., Tensor]
KERNELS: dict[str, Kernel] = {"decode": decode, "batch": batch, "prefill": prefill}
TABLE_NAME = "hopper_h200.json"  # written by tests/bench/tune.py
ALIGNMENT = 8  # of rows and columns: the copy engine moves 16 bytes at a time
BLOCK_COLUMNS = 64
ONE_GROUP = 1 << 30


@dataclass(frozen=True)
class Entry:
    """The fastest kernel for `tokens` (and fewer) × a matrix [rows, columns], with its options."""

    tokens: int
    rows: int
    columns: int
    kernel: str
    options: dict[str, int]


def takes(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether the kernels can run a matrix [rows, columns] with scales of type `dtype`: symmetric, whole blocks."""
    return (
        dtype in (torch.bfloat16, torch.float16)
        and scheme.symmetric
        and rows % ALIGNMENT == 0
        and columns % ALIGNMENT == 0
        and (scheme.groups(columns) == 1 or scheme.group_size % BLOCK_COLUMNS == 0)
    )


def hopper_product(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, scheme: Scheme) -> Tensor:
    """Contiguous x [M, K] · Ŵᵀ + bias → [M, N] for words and scales in kernel order, of the type of x."""
    tokens, columns = x.shape
    kernel, options = choose(tokens, scale.shape[1], columns)
    group = ONE_GROUP if scheme.groups(columns) == 1 else scheme.group_size
    if x.data_ptr() % 16:
        x = x.clone()
    return KERNELS[kernel](x, words, scale, bias, group, **options)


@lru_cache(maxsize=4096)
def choose(tokens: int, rows: int, columns: int) -> tuple[str, dict[str, Any]]:
    """Kernel and options for x [tokens, columns] and a matrix [rows, columns]: those of the nearest shape in the table.

    Of the entries for at least `tokens`, the smallest; a shape's distance is the ratio of its sides.
    """
    entries = table()
    sizes = sorted({entry.tokens for entry in entries})
    size = next((size for size in sizes if size >= tokens), sizes[-1])
    near = min(
        (entry for entry in entries if entry.tokens == size),
        key=lambda entry: abs(log(entry.rows / rows)) + abs(log(entry.columns / columns)),
    )
    options = dict(near.options)
    if "splits" in options:  # every part of K needs a block of columns
        options["splits"] = max(1, min(options["splits"], columns // BLOCK_COLUMNS))
    return near.kernel, options


@cache
def table() -> tuple[Entry, ...]:
    """The measured entries."""
    raw = json.loads((files("runtime.kernels") / TABLE_NAME).read_text())
    return tuple(Entry(**entry) for entry in raw["entries"])
