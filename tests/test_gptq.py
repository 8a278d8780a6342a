import dataclasses
from importlib import import_module

import pytest
import torch
from checkpoints import random
from torch import Tensor

from converter.quantize.gptq import (
    Codes,
    Inputs,
    compensated,
    dampen,
    descended,
    fitted_scales,
    gptq,
    loss,
    of_columns,
    weighted_search,
)
from converter.quantize.search import search
from converter.quantize.sweep import nearest
from formats.codec import dequantize
from formats.errors import CheckpointError
from formats.layout import Scheme

MODULE = import_module("converter.quantize.gptq")  # its package has the function under that name
SWEEP = import_module("converter.quantize.sweep")
SCHEMES = [Scheme(32), Scheme(32, symmetric=False), Scheme(24), Scheme(-1)]
TOKENS, COLUMNS = 400, 64


def correlated(seed: int) -> Tensor:
    """Inputs [TOKENS, COLUMNS] of which some directions are much larger than others."""
    mixed = random(TOKENS, COLUMNS, seed=seed, dtype=torch.float32) @ random(COLUMNS, COLUMNS, seed=9).float()
    return mixed * torch.linspace(10, 300, COLUMNS)


def inputs_of(seen: Tensor, original: Tensor | None = None) -> Inputs:
    drift = None if original is None else (original - seen).T @ seen / TOKENS
    gram = seen.T @ seen / TOKENS
    return Inputs(gram, dampen(gram), drift, TOKENS)


def test_a_loss_is_that_of_the_outputs() -> None:
    seen, difference = correlated(6), random(5, COLUMNS, dtype=torch.float32)
    exact = (seen.double() @ difference.double().T).square().mean(0)
    assert torch.allclose(inputs_of(seen).loss(difference).double(), exact, rtol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_loses_more_than_by_search_and_all_much_less(scheme: Scheme) -> None:
    weight, inputs = random(12, COLUMNS, dtype=torch.float32), inputs_of(correlated(1))
    plain, found = (
        inputs.loss(dequantize(quantized, COLUMNS, scheme) - weight)
        for quantized in (search(weight, scheme, torch.bfloat16), gptq(weight, inputs, scheme, torch.bfloat16))
    )
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < 0.6 * plain.sum()


def test_a_row_that_gptq_makes_worse_is_that_of_search(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, scheme = random(8, COLUMNS, dtype=torch.float32), inputs_of(correlated(1)), Scheme(32)
    monkeypatch.setattr(MODULE, "SWEEPS", 0)
    monkeypatch.setattr(
        MODULE, "descended", lambda codes, *rest: dataclasses.replace(codes, codes=torch.zeros_like(codes.codes))
    )
    found, plain = gptq(weight, inputs, scheme, torch.bfloat16), search(weight, scheme, torch.bfloat16)
    assert torch.equal(found.packed, plain.packed)
    assert torch.equal(found.scale, plain.scale)


def test_what_earlier_layers_changed_is_made_up_for() -> None:
    weight, original = random(12, COLUMNS, dtype=torch.float32), correlated(1)
    seen = original + 0.3 * correlated(2)
    inputs, scheme = inputs_of(seen, original), Scheme(32)
    errors = [
        (original @ weight.T - seen @ dequantize(found, COLUMNS, scheme).T).square().sum()
        for found in (
            gptq(weight, inputs, scheme, torch.bfloat16),
            gptq(weight, dataclasses.replace(inputs, drift=None), scheme, torch.bfloat16),
        )
    ]
    assert errors[0] < 0.9 * errors[1]


def case(seed: int) -> tuple[Tensor, Tensor, Codes]:
    """A weight, a gram matrix, and the codes of plain rounding with one scale for all."""
    weight, gram = random(6, COLUMNS, dtype=torch.float32), inputs_of(correlated(seed)).gram
    scale, zero = torch.full((6, 2), 0.015, dtype=torch.bfloat16), torch.zeros(6, 2, dtype=torch.int8)
    scales = of_columns(scale.float(), Scheme(32), COLUMNS)
    return weight, gram, Codes.of(nearest(weight, scales, torch.zeros_like(scales)), scale, zero, Scheme(32))


def lost(codes: Codes, weight: Tensor, gram: Tensor) -> Tensor:
    return loss(codes.values(Scheme(32)) - weight, gram)


def compensated_codes(codes: Codes, weight: Tensor, gram: Tensor) -> Codes:
    return compensated(weight, codes.scale, codes.zero, gram, Scheme(32))


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _, codes = case(3)
    gram = torch.diag(torch.linspace(1, 2, COLUMNS))
    assert torch.equal(compensated_codes(codes, weight, gram).codes, codes.codes)
    assert torch.equal(descended(codes, weight, gram, Scheme(32)).codes, codes.codes)


def test_every_step_loses_less() -> None:
    weight, gram, plain = case(3)
    first = compensated_codes(plain, weight, gram)
    second = descended(first, weight, gram, Scheme(32))
    third = dataclasses.replace(second, scale=fitted_scales(second, weight, gram, Scheme(32)))
    losses = [lost(codes, weight, gram) for codes in (plain, first, second, third)]
    assert losses[1].sum() < 0.8 * losses[0].sum()
    assert (losses[2] <= losses[1] * (1 + 1e-5)).all()
    assert losses[2].sum() < 0.99 * losses[1].sum()
    assert losses[3].sum() < 0.99 * losses[2].sum()


def test_no_other_scales_fit_better() -> None:
    weight, gram, codes = case(5)
    scale = fitted_scales(codes, weight, gram, Scheme(32))
    least = lost(dataclasses.replace(codes, scale=scale), weight, gram)
    for step in (-0.02, 0.02):
        for group in (0, 1):
            other = scale.clone()
            other[:, group] *= 1 + step
            assert (least <= lost(dataclasses.replace(codes, scale=other), weight, gram) * (1 + 1e-3)).all()


def test_a_group_of_zeros_keeps_its_scale() -> None:
    weight, gram, codes = case(5)
    codes.codes[2, :32] = 0
    scale = fitted_scales(codes, weight, gram, Scheme(32))
    assert scale.isfinite().all()
    assert (scale != 0).all()


def test_columns_are_made_up_for_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, plain = case(3)
    whole = compensated_codes(plain, weight, gram)
    swept = descended(whole, weight, gram, Scheme(32))
    monkeypatch.setattr(SWEEP, "BLOCK_COLUMNS", 24)
    again = compensated_codes(plain, weight, gram)
    assert lost(again, weight, gram).sum() == pytest.approx(lost(whole, weight, gram).sum().item(), rel=0.02)
    again = descended(whole, weight, gram, Scheme(32))
    assert lost(again, weight, gram).sum() == pytest.approx(lost(swept, weight, gram).sum().item(), rel=0.02)


@pytest.mark.parametrize("method", [gptq, weighted_search])
def test_columns_that_no_input_reached_keep_their_values(method: object) -> None:
    seen = correlated(4)
    seen[:, [3, 40]] = 0
    weight, scheme = random(8, COLUMNS, dtype=torch.float32), Scheme(32)
    found = method(weight, inputs_of(seen), scheme, torch.bfloat16)  # type: ignore[operator]
    values, scale = dequantize(found, COLUMNS, scheme), found.scale.float().abs().repeat_interleave(32, 1)
    inside = weight.abs() < 6.5 * scale
    assert inside[:, [3, 40]].any()
    assert ((values - weight).abs() <= 0.51 * scale)[:, [3, 40]][inside[:, [3, 40]]].all()


def test_damping_rises_until_there_is_a_factor() -> None:
    gram = torch.tensor([[1.0, 1.2], [1.2, 1.0]])
    assert dampen(gram) == 1.0
    assert gram.tolist() == [[2.0, pytest.approx(1.2)], [pytest.approx(1.2), 2.0]]


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.full((4, 4), float("nan"))])
def test_inputs_without_a_gram_matrix_are_refused(gram: Tensor) -> None:
    with pytest.raises(CheckpointError, match="no usable gram matrix"):
        dampen(gram)


def test_weighted_search_serves_large_inputs_first() -> None:
    weight, scheme = random(16, COLUMNS, dtype=torch.float32), Scheme(-1)
    seen = torch.ones(TOKENS, COLUMNS)
    seen[:, :8] = 50
    seen *= torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(seen)
    plain, found = (
        inputs.loss(dequantize(quantized, COLUMNS, scheme) - weight).sum()
        for quantized in (
            search(weight, scheme, torch.bfloat16), weighted_search(weight, inputs, scheme, torch.bfloat16)
        )
    )  # fmt: skip
    assert found < 0.8 * plain
