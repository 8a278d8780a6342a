import pytest
import torch
from checkpoints import random

from converter.quality import error_record, sums
from formats import codec
from formats.codec import Quantized
from formats.layout import Scheme


@pytest.mark.parametrize("symmetric", [True, False])
def test_figures_are_those_of_the_dequantised_matrix(symmetric: bool) -> None:
    weight, scheme = random(16, 172, dtype=torch.float32), Scheme(64, symmetric)
    quantized = codec.quantize(weight, scheme, torch.bfloat16)
    found = codec.dequantize(quantized, 172, scheme).double()
    record = error_record(sums(weight, quantized, scheme), weight.numel())
    exact = weight.double()
    assert record.relative_mse == pytest.approx(float((exact - found).square().sum() / exact.square().sum()), rel=1e-5)
    assert record.cosine == pytest.approx(float((exact * found).sum() / (exact.norm() * found.norm())), rel=1e-5)
    assert record.clipped == 0


def test_blocks_add_up() -> None:
    weight, scheme = random(16, 128), Scheme(64)
    parts = [sums(w, codec.quantize(w, scheme, torch.bfloat16), scheme) for w in weight.split(8)]
    whole = sums(weight, codec.quantize(weight, scheme, torch.bfloat16), scheme)
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-9)


@pytest.mark.parametrize(("zero", "clipped"), [(None, 2), (3, 3)])
def test_weights_beyond_the_codes_are_counted(zero: int | None, clipped: int) -> None:
    # With scale 1 codes reach from −8 to 7, with zero point 3 to 4; half a step more is rounded, not clipped.
    weight = torch.tensor([[7.0, 7.5, 7.6, -8.5, -8.6, 0, 0, 0]])
    words = None if zero is None else codec.pack_zero_point(torch.tensor([[zero]], dtype=torch.int8))
    quantized = Quantized(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.bfloat16), words)
    record = error_record(sums(weight, quantized, Scheme(-1, zero is None)), 8)
    assert record.clipped == clipped / 8


def test_a_matrix_of_zeros_is_exact() -> None:
    weight = torch.zeros(8, 16)
    record = error_record(sums(weight, codec.quantize(weight, Scheme(8), torch.bfloat16), Scheme(8)), 128)
    assert (record.relative_mse, record.cosine, record.clipped) == (0, 1, 0)


@pytest.mark.parametrize("rows", [8, 64, 512])
def test_a_matrix_that_is_int4_but_for_noise_is_exact_in_any_blocks(rows: int) -> None:
    scheme = Scheme(16)
    exact = codec.dequantize(codec.quantize(random(512, 64), scheme, torch.bfloat16), 64, scheme)
    weight = exact * (1 + 1e-7 * torch.randn(512, 64, generator=torch.Generator().manual_seed(1)))
    blocks = [sums(part, codec.quantize(part, scheme, torch.bfloat16), scheme) for part in weight.split(rows)]
    assert error_record(torch.stack(blocks).sum(0), weight.numel()).relative_mse == 0
