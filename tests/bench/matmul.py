"""Speed of the int4 linear against torch's bf16 product, checked in the same process before it is printed.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/matmul.py [--tokens 1,16] [--group-sizes 128] [--json FILE]
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import peers
import tables
import torch
from limits import int4_bytes, operations
from products import operands, relative_error
from timing import copies_for, graph_time

from formats.layout import Scheme
from runtime.activations import rounded_to_fp8
from runtime.kernels.hopper_choice import choose
from runtime.linear import Int4Linear
from runtime.ops import FP8_TOKENS, int4_linear

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (14336, 4096), (4096, 14336), (28672, 8192))
MAX_ERROR = 3e-3
COLUMNS = {"N x K": 13, "G": 4, "M": 5, "x": 4, "bf16 us": 9, "int4 us": 9, "speedup": 8, "TFLOP/s": 8, "GB/s": 7,
           "error": 9, **{f"{name} us": 11 for name in peers.PEERS}}  # fmt: skip


@click.command(help=__doc__)
@click.option("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), show_default=True, help="N x K.")
@click.option("--tokens", default="1,16,64,128,512,2048")
@click.option("--group-sizes", default="128,256")
@click.option(
    "--peers", "peers_to", default=128, show_default=True, help="Time other people's kernels to so many tokens."
)
@click.option("--activations", default="bf16,fp8", show_default=True, help="fp8 only where there are tokens enough.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
def main(shapes: str, tokens: str, group_sizes: str, peers_to: int, activations: str, json_file: Path | None) -> None:
    """Print a row a shape and number of tokens; exit with 1 if a result is wrong."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    print(tables.line(COLUMNS))
    rows = []
    for n, k in (map(int, shape.split("x")) for shape in shapes.split(",")):
        for group in map(int, group_sizes.split(",")):
            for m in map(int, tokens.split(",")):
                others = peers.measure(m, n, k, Scheme(group)) if m <= peers_to else {}
                for kind in activations.split(",") if m >= FP8_TOKENS else ("bf16",):
                    row = {**measure(m, n, k, Scheme(group), kind), "peers": others}
                    rows.append(row)
                    print(line(row), flush=True)
    tables.write(json_file, rows)
    sys.exit(not all(row["rel_error"] <= MAX_ERROR for row in rows))


def line(row: dict[str, Any]) -> str:
    """The row for people, without the speed of a wrong result."""
    m, n, k, us = row["m"], row["n"], row["k"], row["us"]
    return tables.line(
        COLUMNS,
        [
            f"{n}x{k}", row["group"], m, row["activations"], f"{row['cublas_us']:.1f}", f"{us:.1f}",
            f"{row['ratio']:.2f}" if row["rel_error"] <= MAX_ERROR else "WRONG",
            f"{operations(m, n, k) / us / 1e6:.0f}", f"{int4_bytes(m, n, k, row['group']) / us / 1e3:.0f}",
            f"{row['rel_error']:.2e}", *(row["peers"].get(name, "–") for name in peers.PEERS),
        ],
    )  # fmt: skip


def measure(m: int, n: int, k: int, scheme: Scheme, activations: str = "bf16") -> dict[str, Any]:
    """Microseconds of the int4 linear and of torch's product in bf16, and the relative error, of one size."""
    x, quantized, _ = operands(m, n, k, scheme, torch.bfloat16, "cuda")
    layer = Int4Linear(k, n, scheme, bias=False, device="meta")
    layer.hold(quantized)
    layer.arrange()
    fp8 = activations == "fp8"
    int4 = partial(
        int4_linear, x, scale=layer.weight_scale, zero_point=layer.weight_zero_point, bias=None,
        group_size=scheme.group_size, fp8=fp8,
    )  # fmt: skip
    seen = rounded_to_fp8(x) if fp8 else x  # what x is rounded to is a choice of the user, no error of the kernel
    error = relative_error(int4(packed=layer.weight_packed), seen, quantized, None, scheme)
    packed = [layer.weight_packed.clone() for _ in range(copies_for(layer.weight_packed.nbytes))]
    weights = [torch.randn(n, k, device="cuda").bfloat16().T for _ in range(copies_for(2 * n * k))]
    us = graph_time([partial(int4, packed=copy) for copy in packed])
    cublas_us = graph_time([partial(torch.matmul, x, weight) for weight in weights])
    return {
        "n": n, "k": k, "m": m, "group": scheme.group_size, "activations": activations, "us": round(us, 2),
        "cublas_us": round(cublas_us, 2), "ratio": round(cublas_us / us, 3), "rel_error": error,
        "kernel": choose(m, n, k, activations)[0] if layer.arranged else "portable",
    }  # fmt: skip


if __name__ == "__main__":
    main()
