"""Speed of the int4 linear against torch's bf16 product, checked in the same process before it is printed.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/linear.py [--tokens 1,16] [--group-size 128]
"""

import sys
from functools import partial

import click
import torch
from products import operands, relative_error
from timing import copies_for, graph_time

from formats.layout import Scheme
from runtime.linear import Int4Linear
from runtime.ops import int4_linear

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (14336, 4096), (4096, 14336), (28672, 8192))
MAX_ERROR = 3e-3


@click.command(help=__doc__)
@click.option("--tokens", default="1,16,64,128,512,2048")
@click.option("--group-size", default=128)
def main(tokens: str, group_size: int) -> None:
    """Print a row a shape and number of tokens."""
    scheme = Scheme(group_size)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, group size {group_size}")
    print(f"{'N x K':>13} {'M':>5} {'bf16 us':>9} {'int4 us':>9} {'speedup':>8} {'error':>9}")
    failed = False
    for rows, columns in SHAPES:
        for count in map(int, tokens.split(",")):
            error, int4, bf16 = measure(count, rows, columns, scheme)
            failed |= not error <= MAX_ERROR
            speed = f"{bf16 / int4:8.2f}" if error <= MAX_ERROR else "   WRONG"
            print(f"{rows:>6}x{columns:<6} {count:>5} {bf16:>9.1f} {int4:>9.1f} {speed} {error:>9.2e}", flush=True)
    sys.exit(failed)


def measure(tokens: int, rows: int, columns: int, scheme: Scheme) -> tuple[float, float, float]:
    """Relative error, microseconds of the int4 linear and of torch's product in bf16."""
    x, quantized, _ = operands(tokens, rows, columns, scheme, torch.bfloat16, "cuda")
    layer = Int4Linear(columns, rows, scheme, bias=False, device="meta")
    layer.weight_packed, layer.weight_scale = quantized.packed, quantized.scale
    layer.arrange()
    scale, group = layer.weight_scale, scheme.group_size
    int4 = partial(int4_linear, x, scale=scale, zero_point=None, bias=None, group_size=group)
    error = relative_error(int4(packed=layer.weight_packed), x, quantized, None, scheme)
    packed = [layer.weight_packed.clone() for _ in range(copies_for(layer.weight_packed.nbytes))]
    weights = [torch.randn(rows, columns, device="cuda").bfloat16().T for _ in range(copies_for(2 * rows * columns))]
    return (
        error,
        graph_time([partial(int4, packed=copy) for copy in packed]),
        graph_time([partial(torch.matmul, x, weight) for weight in weights]),
    )


if __name__ == "__main__":
    main()
