import pytest
import torch
from checkpoints import random

from converter.quantize.absmax import absmax
from formats import codec
from formats.errors import NonFiniteError
from formats.layout import Scheme

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


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "size"), GPU_CASES)
def test_kernel_gives_the_codecs_bits_on_a_gpu(
    rows: int, columns: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    same_as_codec(rows, columns, size, symmetric, dtype, "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_kernel_sees_weights_that_are_not_finite(bad: float, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter stands in for a GPU")
    weight = random(37, 172)
    weight[21, 170] = bad
    with pytest.raises(NonFiniteError, match="row 21, column 170"):
        kernels.absmax(weight.to(device), Scheme(64), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smallest", [2.0**-149, 2.0**-133, 2.0**-126])
def test_subnormal_weights_give_the_codecs_bits_on_a_gpu(smallest: float, dtype: torch.dtype) -> None:
    weight = (torch.arange(64.0).view(2, 32) * smallest).to(dtype)
    scale_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    expected, found = (absmax(w, Scheme(8), scale_dtype) for w in (weight, weight.cuda()))
    assert torch.equal(expected.packed, found.packed.cpu())
    assert torch.equal(expected.scale, found.scale.cpu())
