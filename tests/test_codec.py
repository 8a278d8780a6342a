import pytest
import torch
from checkpoints import random
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import codec
from formats.errors import CheckpointError, NonFiniteError
from formats.layout import Scheme

SCHEMES = [Scheme(size, symmetric) for size in (-1, 8, 24, 64, 256) for symmetric in (True, False)]


def quantize_dequantize(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return codec.dequantize(codec.quantize(weight, scheme, dtype), weight.shape[1], scheme)


def test_words_hold_columns_from_the_low_bits_up() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7, 1]], dtype=torch.int8)
    words = codec.pack(codes)
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0xF6543210, 0x88888889]  # pad code 0 is stored as 8


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_unpack_inverts_pack(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(codec.unpack(codec.pack(codes), columns), codes)
    assert torch.equal(codec.unpack_zero_point(codec.pack_zero_point(codes), rows), codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_is_within_half_a_step_and_the_rounding_of_the_scale(scheme: Scheme) -> None:
    weight = random(37, 172, dtype=torch.float32)
    quantized = codec.quantize(weight, scheme, torch.bfloat16)
    error = (codec.dequantize(quantized, 172, scheme) - weight).abs()
    step = codec.grouped(error, scheme).amax(-1) / quantized.scale.float()
    steps = 7 if scheme.symmetric else 15  # each may be off by the rounding of a bf16 scale
    assert step.max() <= 0.5 + steps * 2**-8


def test_absmax_symmetric_scale_is_a_seventh_of_the_largest_weight() -> None:
    weight = torch.tensor([[0.5, -1.75, 0.25, 0, 0, 0, 0, 0]])
    quantized = codec.quantize(weight, Scheme(8), torch.bfloat16)
    assert quantized.scale.item() == 0.25
    assert codec.unpack(quantized.packed, 8)[0].tolist() == [2, -7, 1, 0, 0, 0, 0, 0]


def test_min_max_uses_all_sixteen_codes() -> None:
    weight = torch.arange(16.0)[None]
    quantized = codec.quantize(weight, Scheme(16, symmetric=False), torch.bfloat16)
    assert codec.unpack(quantized.packed, 16)[0].tolist() == list(range(-8, 8))
    assert torch.equal(codec.dequantize(quantized, 16, Scheme(16, False)), weight)


def test_ties_round_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.0, 0]])
    codes = codec.encode(weight, torch.ones(1, 1), None, Scheme(8))
    assert codes[0].tolist() == [0, 2, 2, 0, -2, -2, 7, 0]


def test_codes_come_from_the_scale_as_stored() -> None:
    weight = torch.full((1, 8), 1.0)
    scale = torch.tensor([[1 / 7]]).bfloat16()  # above a seventh: the weight falls below 7 steps
    assert codec.encode(weight, scale, None, Scheme(8))[0, 0] == round(1.0 / scale.item())


def test_a_negative_scale_turns_the_codes_round() -> None:
    weight = torch.tensor([[8.0, -7.0, 1.0, 0, 0, 0, 0, 0]])
    scale = torch.tensor([[-1.0]]).bfloat16()
    codes = codec.encode(weight, scale, None, Scheme(8))
    assert codes[0, :3].tolist() == [-8, 7, -1]
    assert torch.equal(codec.dequantize(codec.Quantized(codec.pack(codes), scale, None), 8, Scheme(8)), weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_all_zero_group_has_scale_1_and_stays_zero(scheme: Scheme) -> None:
    zeros = torch.tensor([[0.0], [-0.0], [0.0]]).expand(3, 300)
    quantized = codec.quantize(zeros, scheme, torch.bfloat16)
    assert (quantized.scale == 1).all()
    assert not codec.dequantize(quantized, 300, scheme).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_weights_never_give_a_zero_scale(dtype: torch.dtype, symmetric: bool) -> None:
    weight = torch.full((1, 8), torch.finfo(dtype).smallest_normal / 1024).to(dtype)
    quantized = codec.quantize(weight, Scheme(8, symmetric), dtype)
    codec.check_scale(quantized.scale)
    assert torch.isfinite(codec.dequantize(quantized, 8, Scheme(8, symmetric))).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_finite_weights_stay_finite(symmetric: bool) -> None:
    weight = torch.tensor([[torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]]).bfloat16()
    codec.check_scale(codec.quantize(weight, Scheme(8, symmetric), torch.bfloat16).scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(bad: float) -> None:
    weight = random(5, 16)
    weight[3, 11] = bad
    with pytest.raises(NonFiniteError, match="1 of 80 weights .* row 3, column 11"):
        codec.quantize(weight, Scheme(8), torch.bfloat16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_stored_scale_must_be_finite_and_not_zero(bad: float) -> None:
    with pytest.raises(CheckpointError, match="1 of 2 scales"):
        codec.check_scale(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("columns", [48, 53])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_matrix_of_a_stack_is_as_it_would_be_alone(scheme: Scheme, columns: int) -> None:
    stack = random(3, 11, columns)
    whole, alone = (
        codec.quantize(stack, scheme, torch.float16),
        [codec.quantize(w, scheme, torch.float16) for w in stack],
    )
    for found, *expected in zip(whole.tensors(), *(one.tensors() for one in alone), strict=True):
        assert torch.equal(found, torch.stack(expected))
        assert found.is_contiguous()
    values = codec.dequantize(whole, columns, scheme, torch.bfloat16)
    assert torch.equal(values, torch.stack([codec.dequantize(one, columns, scheme, torch.bfloat16) for one in alone]))


def test_the_place_of_a_bad_weight_names_its_matrix() -> None:
    stack = random(2, 5, 16)
    stack[1, 3, 11] = float("nan")
    with pytest.raises(NonFiniteError, match="1 of 160 weights .* matrix 1, row 3, column 11;"):
        codec.check_finite(stack)


def test_a_short_last_group_is_scaled_by_its_own_weights() -> None:
    weight = torch.cat([torch.full((1, 8), 7.0), torch.full((1, 2), 0.07)], 1)
    assert quantize_dequantize(weight, Scheme(8), torch.float16)[0, -1] == pytest.approx(0.07, rel=1e-3)


def test_non_contiguous_weights_are_read_by_their_strides() -> None:
    weight = random(64, 24).T
    assert torch.equal(quantize_dequantize(weight, Scheme(8)), quantize_dequantize(weight.contiguous(), Scheme(8)))


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.bfloat16, 2.0**-126), (torch.float16, 2.0**-24)])
def test_tiny_weights_get_the_smallest_scale_that_the_format_allows(dtype: torch.dtype, smallest: float) -> None:
    assert codec.quantize(torch.full((1, 8), 2.0**-140), Scheme(8), dtype).scale.item() == smallest


def test_a_group_whose_scale_underflows_counts_as_zeros() -> None:
    assert codec.quantize(torch.full((1, 8), 2.0**-149), Scheme(8), torch.bfloat16).scale.item() == 1
