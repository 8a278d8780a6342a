import pytest
import torch
from products import check_product, operands

from formats.layout import Scheme

splitk = pytest.importorskip("runtime.kernels.splitk", reason="Triton is not on this platform").splitk

SCHEMES = [Scheme(-1), Scheme(8), Scheme(24, False), Scheme(64), Scheme(128, False), Scheme(256)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 172), (3, 70, 1000), (20, 65, 264)])
def test_splitk_agrees_with_the_codec(tokens: int, rows: int, columns: int, scheme: Scheme) -> None:
    check_product(splitk, tokens, rows, columns, scheme, torch.float16, "cpu", bias=tokens == 3)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 1, 172), (3, 70, 1000), (15, 333, 172), (1, 4096, 14336), (8, 2048, 2048)]
)
def test_splitk_agrees_with_the_codec_on_a_gpu(
    tokens: int, rows: int, columns: int, scheme: Scheme, dtype: torch.dtype
) -> None:
    check_product(splitk, tokens, rows, columns, scheme, dtype, "cuda", bias=tokens == 3)


@pytest.mark.gpu
def test_splitk_gives_the_same_bits_every_run() -> None:
    x, quantized, _ = operands(4, 2048, 8192, Scheme(128), torch.bfloat16, "cuda")
    first = splitk(x, quantized, None, Scheme(128))
    assert all(torch.equal(first, splitk(x, quantized, None, Scheme(128))) for _ in range(20))
