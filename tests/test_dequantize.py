import pytest
import torch
from checkpoints import random

from formats import codec
from formats.layout import Scheme

dequantize = pytest.importorskip("runtime.kernels.dequantize", reason="Triton is not on this platform").dequantize

SCHEMES = [Scheme(-1), Scheme(8), Scheme(24, False), Scheme(64), Scheme(128, False)]
SHAPES = [(1, 8), (9, 172), (3, 12, 520), (2, 5, 64)]


def check(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype, device: str) -> None:
    quantized = codec.quantize(random(*shape, dtype=torch.float16), scheme, torch.float16)
    expected = codec.dequantize(quantized, shape[-1], scheme, dtype)
    moved = codec.Quantized(*(None if t is None else t.to(device) for t in vars(quantized).values()))
    found = dequantize(moved, shape[-1], scheme, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_has_the_bits_of_the_codec(shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> None:
    check(shape, scheme, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 14336), (32, 96, 2880)], ids=str)
def test_the_kernel_has_the_bits_of_the_codec_on_a_gpu(
    shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype
) -> None:
    check(shape, scheme, dtype, "cuda")
