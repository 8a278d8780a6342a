from collections.abc import Callable

import pytest
import torch
from checkpoints import random

from converter.quantize.absmax import absmax
from formats import codec
from formats.errors import NonFiniteError
from formats.layout import Scheme, ceil_div

kernels = pytest.importorskip("converter.quantize.kernels", reason="Triton is not on this platform")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = [(37, 172, -1), (1, 8, 8), (3, 300, 24), (18, 520, 256), (2, 3, 8), (2, 9000, -1)]
GPU_CASES = [*CASES, (2048, 2048, 256), (4096, 14336, 128), (333, 28672, -1), (1000, 4096, 8)]


def same_as_codec(rows: int, columns: int, size: int, symmetric: bool, dtype: torch.dtype, device: str) -> None:
    weight = random(rows, columns, dtype=dtype, seed=rows)
    weight[0, :8] = 0
    weight[-1, -1] = 0.9  # far out, and in the last, short group
    scheme = Scheme(size, symmetric)
    scale_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    expected = codec.quantize(weight, scheme, scale_dtype)
    found = kernels.absmax(weight.to(device), scheme, scale_dtype)
    for one, other in zip(expected.tensors(), found.tensors(), strict=True):
        assert torch.equal(one, other.cpu())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "size"), CASES)
def test_kernel_gives_the_codecs_bits(rows: int, columns: int, size: int, symmetric: bool, dtype: torch.dtype) -> None:
    same_as_codec(rows, columns, size, symmetric, dtype, "cpu")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "bits", "step"), [(torch.bfloat16, 8, 1), (torch.float16, 11, 37)], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_quotients_are_rounded_as_by_division(
    device: str, dtype: torch.dtype, bits: int, step: int, symmetric: bool
) -> None:
    """Weights of every mantissa and six exponents, in rows whose largest has every `step`-th: ties are among them."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter stands in for a GPU")
    mantissas = torch.arange(1 << (bits - 1), 1 << bits) / (1 << (bits - 1))
    smaller = torch.cat([mantissas * 2.0**-exponent for exponent in range(6)])
    smaller[1::2] *= -1
    largest = 2 * mantissas[::step, None]
    weight = torch.cat((largest, smaller.expand(len(largest), -1), -largest / 16), 1).to(dtype)
    scheme = Scheme(-1, symmetric)
    expected = codec.quantize(weight, scheme, dtype)
    found = kernels.absmax(weight.to(device), scheme, dtype)
    assert torch.equal(found.scale.cpu(), expected.scale)
    assert torch.equal(found.packed.cpu(), expected.packed)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "size"), GPU_CASES)
def test_kernel_gives_the_codecs_bits_on_a_gpu(
    rows: int, columns: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    same_as_codec(rows, columns, size, symmetric, dtype, "cuda")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_kernel_sees_weights_that_are_not_finite(bad: float, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter stands in for a GPU")
    weight = random(37, 172)
    weight[21, 170] = bad
    with pytest.raises(NonFiniteError, match="row 21, column 170"):
        kernels.absmax(weight.to(device), Scheme(64), torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("places", [[8500], [8500, 8501], [5, 8500]])
def test_kernel_sees_bad_weights_in_every_chunk_of_a_long_group(places: list[int], device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter stands in for a GPU")
    weight = random(2, 9000)
    weight[1, places] = float("nan")
    with pytest.raises(NonFiniteError, match=f"{len(places)} of 18000 .* row 1, column {places[0]}"):
        kernels.absmax(weight.to(device), Scheme(-1), torch.bfloat16)


def test_all_programs_are_on_the_one_axis_that_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(kernels, "quantize_kernel", Kernel())
    kernels.absmax(random(3, 8 * 70_000), Scheme(8), torch.bfloat16)
    assert grids == [(ceil_div(3 * 70_000, kernels.TILE_WORDS),)]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_more_groups_in_a_row_than_a_second_axis_could_count() -> None:
    same_as_codec(3, 8 * 70_000, 8, True, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_kernel_runs_on_the_gpu_that_holds_the_weight() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    same_as_codec(37, 172, 64, True, torch.bfloat16, "cuda:1")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smallest", [2.0**-149, 2.0**-133, 2.0**-126])
def test_subnormal_weights_give_the_codecs_bits_on_a_gpu(smallest: float, dtype: torch.dtype) -> None:
    weight = (torch.arange(64.0).view(2, 32) * smallest).to(dtype)
    scale_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    expected, found = (absmax(w, Scheme(8), scale_dtype) for w in (weight, weight.cuda()))
    assert torch.equal(expected.packed, found.packed.cpu())
    assert torch.equal(expected.scale, found.scale.cpu())


@pytest.mark.gpu
def test_a_matrix_of_more_weights_than_31_bits_count() -> None:
    last = random(8, 1 << 14).cuda()
    weight = torch.zeros((1 << 17) + 8, 1 << 14, dtype=torch.bfloat16, device="cuda")
    weight[-8:] = last
    found, expected = (absmax(w, Scheme(128, symmetric=False), torch.bfloat16) for w in (weight, last))
    assert torch.equal(found.packed[-8:], expected.packed)
    assert torch.equal(found.scale[-8:], expected.scale)
    assert torch.equal(found.zero_point[-1:], expected.zero_point)
