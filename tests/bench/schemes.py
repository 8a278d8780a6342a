"""How much of N(0, 1) matrices is lost by each scheme and group size, beside what earlier projects published.

The mean absolute and the mean squared error of every weight, and how many times smaller the matrix is than in 16 bits.
Theirs are absmax / 7 and min–max with scales in fp32 (2048×8192) or 16 bits (4096×4096). Exits with 1 if an error of
the default method is not below theirs, or its matrix is larger.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/schemes.py [--device cuda] [--json FILE]
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import tables
import torch

from converter.quantize import DEFAULT_METHOD, METHODS
from formats import codec
from formats.layout import Scheme

GROUPS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SCHEMES = (Scheme(-1), Scheme(-1, symmetric=False), *map(Scheme, GROUPS))
# Mean absolute error and compression, by shape, group size and symmetry.
THEIRS: dict[tuple[int, int], dict[tuple[int, bool], tuple[float, float | None]]] = {
    (2048, 8192): {
        (-1, True): (0.1415, 4.00), (-1, False): (0.1265, 3.99), (8, True): (0.0558, 2.00), (128, True): (0.1002, 3.76),
        (256, True): (0.1083, 3.88), (512, True): (0.1158, 3.94),
    },
    (4096, 4096): {
        (-1, True): (0.102292, None), (-1, False): (0.261056, None), (16, True): (0.069818, 3.20),
        (32, True): (0.076317, None), (64, True): (0.082923, None), (128, True): (0.089438, 3.88),
        (256, True): (0.095812, None), (512, True): (0.101973, None), (1024, True): (0.107892, None),
        (2048, True): (0.113559, None), (4096, True): (0.119017, 4.00),
    },
}  # fmt: skip
COLUMNS = {"N x K": 11, "G": 5, "zero": 5, "method": 7, "MAE": 9, "MSE": 9, "times": 6, "their MAE": 10, "times ": 6}


@dataclass(frozen=True)
class Row:
    """One method and scheme on one matrix."""

    n: int
    k: int
    group: int
    symmetric: bool
    method: str
    mae: float
    mse: float
    compression: float
    their_mae: float | None
    their_compression: float | None

    @property
    def better(self) -> bool:
        """Whether it loses less than theirs and is no larger."""
        if self.their_mae is None:
            return True
        return self.mae < self.their_mae and round(self.compression, 2) >= (self.their_compression or 0)


def measure(n: int, k: int, weight: torch.Tensor) -> Iterator[Row]:
    """Every scheme by every method."""
    for scheme in SCHEMES:
        theirs = THEIRS[n, k].get((scheme.group_size, scheme.symmetric), (None, None))
        for name, method in METHODS.items():
            quantized = method(weight, scheme, torch.bfloat16)
            difference = (weight - codec.dequantize(quantized, k, scheme)).double()
            nbytes = sum(tensor.nbytes for tensor in quantized.tensors())
            yield Row(n, k, scheme.group_size, scheme.symmetric, name, difference.abs().mean().item(),
                      difference.square().mean().item(), 2 * n * k / nbytes, *theirs)  # fmt: skip


def line(row: Row) -> str:
    """The row for people."""
    theirs = [f"{row.their_mae:.6f}" if row.their_mae else "", f"{row.their_compression:.2f}" if row.their_compression
              else ""]  # fmt: skip
    return tables.line(COLUMNS, [f"{row.n}x{row.k}", row.group, "sym" if row.symmetric else "asym", row.method,
                                 f"{row.mae:.6f}", f"{row.mse:.6f}", f"{row.compression:.2f}", *theirs])  # fmt: skip


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
def main(device: str, json_file: Path | None) -> None:
    """Print a row a scheme and method."""
    rows = []
    for n, k in THEIRS:
        torch.manual_seed(0)
        weight = torch.randn(n, k)
        print(f"{n}x{k}: {weight.min().item():.3f} to {weight.max().item():.3f}")
        print(tables.line(COLUMNS))
        for row in measure(n, k, weight.to(device)):
            rows.append(row)
            print(line(row), flush=True)
    tables.write(json_file, map(asdict, rows))
    sys.exit(not all(row.better for row in rows if row.method == DEFAULT_METHOD))


if __name__ == "__main__":
    main()
