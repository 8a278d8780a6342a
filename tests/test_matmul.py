import pytest
import torch
from products import check_product

from formats.layout import Scheme

matmul = pytest.importorskip("runtime.kernels.matmul", reason="Triton is not on this platform").matmul

SCHEMES = [Scheme(-1), Scheme(8), Scheme(24, False), Scheme(64), Scheme(128, False), Scheme(256)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 1, 172), (17, 70, 172), (300, 130, 264), (16, 128, 256)])
def test_matmul_agrees_with_the_codec(tokens: int, rows: int, columns: int, scheme: Scheme) -> None:
    check_product(matmul, tokens, rows, columns, scheme, torch.float16, "cpu", bias=tokens == 17)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(1, 1, 172), (17, 70, 172), (300, 333, 1000), (64, 2048, 2048), (129, 1024, 4096), (2048, 2048, 2048)],
)
def test_matmul_agrees_with_the_codec_on_a_gpu(
    tokens: int, rows: int, columns: int, scheme: Scheme, dtype: torch.dtype
) -> None:
    check_product(matmul, tokens, rows, columns, scheme, dtype, "cuda", bias=tokens == 17)
