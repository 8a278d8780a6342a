"""Speed of the converter's quantisation and of the repacking for Hopper, against the GPU's own copy of bytes.

Every result is checked first: quantisation bit for bit against torch, repacking by its way back. Bytes are those
read plus those written, once each.

Run: PYTHONPATH=.:tests:tests/bench python tests/bench/quantize.py [--group-sizes 128] [--json FILE]
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import tables
import torch
from timing import alternate, copies_for, graph_time
from torch import Tensor

from converter.quantize import kernels
from converter.quantize.search import by_torch
from formats import codec
from formats.codec import Quantized
from formats.layout import Scheme
from runtime.repack import arrange, restore

SHAPES = ((8192, 8192), (14336, 4096))
REPACK_GROUP = 128
COPIED = 1 << 29  # elements
METHODS = {"absmax": (kernels.absmax, codec.quantize), "search": (kernels.search, by_torch)}


@dataclass(frozen=True)
class Row:
    """One pass over a matrix: its kernels alone in microseconds, and the calls of converter and codec that wait."""

    work: str
    n: int
    k: int
    group: int
    symmetric: bool
    us: float
    nbytes: int
    right: bool
    call_us: float | None = None
    codec_us: float | None = None

    @property
    def gb_s(self) -> float:
        """Gigabytes read and written a second."""
        return self.nbytes / self.us / 1e3

    def record(self, copy_gb_s: float) -> dict[str, Any]:
        """The row for programs."""
        share = {"gb_s": round(self.gb_s, 1), "percent_of_copy": round(100 * self.gb_s / copy_gb_s, 1)}
        return {**asdict(self), **share}


def moved(*tensors: Tensor) -> int:
    """Bytes of all of `tensors`."""
    return sum(tensor.nbytes for tensor in tensors)


def same(found: Quantized, expected: Quantized) -> bool:
    """Whether two matrices have the same bits."""
    pairs = zip(found.tensors(), expected.tensors(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def copy_bandwidth(elements: int, device: str) -> float:
    """Gigabytes a second, read plus written, of the fastest way to copy bf16: torch's copy or an elementwise kernel."""
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    ways: list[Callable[[], Tensor]] = [partial(target.copy_, source), partial(torch.neg, source, out=target)]
    return moved(source, target) / min(graph_time([way, way]) for way in ways) / 1e3


def random_weight(n: int, k: int, device: str) -> Tensor:
    """A matrix in bf16 from N(0, 0.02²)."""
    return (torch.randn(n, k, device=device) * 0.02).bfloat16()


def cold(make: Callable[[Tensor], object], operand: Tensor) -> float:
    """Microseconds of `make` on copies of an operand that the cache does not hold."""
    copies = [operand.clone() for _ in range(copies_for(operand.nbytes))]
    return graph_time([partial(make, copy) for copy in copies])


def measure_method(work: str, n: int, k: int, scheme: Scheme, device: str) -> Row:
    """A kernel of the converter, `absmax` or `search`, against torch on the same device."""
    weight = random_weight(n, k, device)
    kernel, by_torch = METHODS[work]
    expected = by_torch(weight, scheme, torch.bfloat16)
    found = kernel(weight, scheme, torch.bfloat16)
    launch = partial(kernels.launch, scheme=scheme, scale_dtype=torch.bfloat16, search=work == "search")
    calls: dict[str, Callable[[], object]] = {
        "call_us": partial(kernel, weight, scheme, torch.bfloat16),
        "codec_us": partial(by_torch, weight, scheme, torch.bfloat16),
    }
    waiting = {name: round(1e6 * seconds, 1) for name, seconds in alternate(calls).items()}
    return Row(work, n, k, scheme.group_size, scheme.symmetric, round(cold(launch, weight), 2),
               moved(weight, *found.tensors()), same(found, expected), **waiting)  # fmt: skip


def measure_repack(n: int, k: int, device: str) -> Iterator[Row]:
    """From the format's order to the kernels', and back."""
    scheme = Scheme(REPACK_GROUP)
    matrix = codec.quantize(random_weight(n, k, device), scheme, torch.bfloat16)
    arranged = arrange(matrix)
    right = same(restore(arranged, k), matrix)
    nbytes = moved(*arranged.tensors(), *matrix.tensors())
    times = {
        "arrange": cold(lambda packed: arrange(Quantized(packed, matrix.scale, None)), matrix.packed),
        "restore": cold(lambda words: restore(Quantized(words, arranged.scale, None), k), arranged.packed),
    }
    for work, us in times.items():
        yield Row(work, n, k, REPACK_GROUP, True, round(us, 2), nbytes, right)


def measure(group_sizes: Sequence[int], device: str) -> Iterator[Row]:
    """Every row."""
    for n, k in SHAPES:
        for group in group_sizes:
            for symmetric in (True, False):
                for work in METHODS:
                    yield measure_method(work, n, k, Scheme(group, symmetric), device)
        yield from measure_repack(n, k, device)


COLUMNS = {"work": 7, "N x K": 13, "G": 4, "zero": 4, "us": 8, "GB/s": 6, "% copy": 6, "call us": 9, "codec us": 9,
           "speedup": 8}  # fmt: skip


def line(row: Row, copy_gb_s: float) -> str:
    """The row for people, without the speed of a wrong result."""
    cells: list[object] = [row.work, f"{row.n}x{row.k}", row.group, "sym" if row.symmetric else "asym"]
    if row.right:
        cells += [f"{row.us:.1f}", f"{row.gb_s:.0f}", f"{100 * row.gb_s / copy_gb_s:.0f}"]
    else:
        cells += ["WRONG", "", ""]
    if row.right and row.call_us and row.codec_us:
        cells += [f"{row.call_us:.1f}", f"{row.codec_us:.0f}", f"{row.codec_us / row.call_us:.1f}"]
    return tables.line(COLUMNS, cells)


@click.command(help=__doc__)
@click.option("--group-sizes", default="128,256,-1", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
def main(group_sizes: str, json_file: Path | None) -> None:
    """Print a row a shape and scheme; exit with 1 if a result is wrong."""
    torch.manual_seed(0)
    copy_gb_s = copy_bandwidth(COPIED, "cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; copy {copy_gb_s:.0f} GB/s")
    print(tables.line(COLUMNS))
    rows = []
    for row in measure([int(size) for size in group_sizes.split(",")], "cuda"):
        rows.append(row)
        print(line(row, copy_gb_s), flush=True)
    tables.write(json_file, (row.record(copy_gb_s) for row in rows))
    sys.exit(not all(row.right for row in rows))


if __name__ == "__main__":
    main()
