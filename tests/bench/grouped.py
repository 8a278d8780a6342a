"""Speed of a mixture's product in int4 against torch's grouped one in bf16, checked before it is printed.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/grouped.py [--tokens 1,16] [--json FILE]
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import tables
import torch
from products import distance, exact_grouped_product
from timing import copies_for, graph_time
from torch import Tensor

from formats import codec
from formats.layout import Scheme
from runtime.ops import int4_grouped_linear

# Experts, how many a token takes, and [N, K] of their two projections.
MODELS = {
    "Mixtral-8x7B": (8, 2, ((28672, 4096), (4096, 14336))),
    "Qwen3-30B-A3B": (128, 8, ((1536, 2048), (2048, 768))),
    "gpt-oss-20b": (32, 4, ((5760, 2880), (2880, 2880))),
}
MAX_ERROR = 3e-3
COLUMNS = {"model": 14, "experts": 8, "N x K": 11, "tokens": 7, "rows": 6, "bf16 us": 9, "int4 us": 9, "speedup": 8,
           "error": 9}  # fmt: skip


@click.command(help=__doc__)
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--tokens", default="1,4,16,64,256,1024,4096", show_default=True)
@click.option("--group-size", default=128, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
def main(models: str, tokens: str, group_size: int, json_file: Path | None) -> None:
    """Print a row a projection and number of tokens; exit with 1 if a result is wrong."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, groups of {group_size}")
    print(tables.line(COLUMNS))
    rows = []
    for model in models.split(","):
        experts, chosen, sizes = MODELS[model]
        for n, k in sizes:
            for m in map(int, tokens.split(",")):
                rows.append({"model": model, **measure(m, n, k, experts, chosen, Scheme(group_size))})
                print(line(rows[-1]), flush=True)
    tables.write(json_file, rows)
    sys.exit(not all(row["rel_error"] <= MAX_ERROR for row in rows))


def line(row: dict[str, Any]) -> str:
    """The row for people, without the speed of a wrong result."""
    return tables.line(
        COLUMNS,
        [
            row["model"], row["experts"], f"{row['n']}x{row['k']}", row["m"], row["rows"], f"{row['bf16_us']:.1f}",
            f"{row['us']:.1f}", f"{row['ratio']:.2f}" if row["rel_error"] <= MAX_ERROR else "WRONG",
            f"{row['rel_error']:.2e}",
        ],
    )  # fmt: skip


def measure(m: int, n: int, k: int, experts: int, chosen: int, scheme: Scheme) -> dict[str, Any]:
    """Microseconds of the int4 product and of torch's in bf16, for `m` tokens that take `chosen` of `experts` each."""
    torch.manual_seed(0)
    expert = torch.rand(m, experts, device="cuda").topk(chosen).indices.flatten().sort().values
    ends = torch.searchsorted(expert, torch.arange(experts, device="cuda"), right=True)
    x = torch.randn(m * chosen, k, device="cuda").bfloat16()
    weight = (torch.randn(experts, n, k, device="cuda") * 0.02).bfloat16()
    stack = quantized(weight, scheme)
    int4 = partial(int4_grouped_linear, x, ends, zero_point=None, group_size=scheme.group_size)
    error = distance(int4(packed=stack.packed, scale=stack.scale), exact_grouped_product(x, ends, stack, scheme))
    copies = [(stack.packed.clone(), stack.scale) for _ in range(copies_for(stack.packed.nbytes))]
    us = graph_time([partial(int4, packed=packed, scale=scale) for packed, scale in copies])
    offsets = ends.to(torch.int32)
    weights = [weight.clone().transpose(1, 2) for _ in range(copies_for(weight.nbytes))]
    bf16_us = graph_time([partial(torch._grouped_mm, x, one, offs=offsets) for one in weights])
    return {
        "experts": experts, "n": n, "k": k, "m": m, "rows": m * chosen, "group": scheme.group_size,
        "us": round(us, 2), "bf16_us": round(bf16_us, 2), "ratio": round(bf16_us / us, 3), "rel_error": error,
    }  # fmt: skip


def quantized(weight: Tensor, scheme: Scheme) -> codec.Quantized:
    """The stack of matrices of `weight` [E, N, K], one by one, because the codec takes much memory."""
    matrices = [codec.quantize(matrix, scheme, weight.dtype) for matrix in weight]
    return codec.Quantized(torch.stack([one.packed for one in matrices]), torch.stack([one.scale for one in matrices]),
                           None)  # fmt: skip


if __name__ == "__main__":
    main()
