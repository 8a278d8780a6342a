import dataclasses
from importlib import import_module

import pytest
import torch
from checkpoints import random
from torch import Tensor

from converter.quantize.gptq import Inputs, compensated, damped, descended, gptq, loss, nearest, weighted_search
from converter.quantize.search import search
from formats.codec import dequantize
from formats.errors import CheckpointError
from formats.layout import Scheme

MODULE = import_module("converter.quantize.gptq")  # its package has the function under that name
SCHEMES = [Scheme(32), Scheme(32, symmetric=False), Scheme(24), Scheme(-1)]
TOKENS, COLUMNS = 400, 64


def correlated(seed: int) -> Tensor:
    """Inputs [TOKENS, COLUMNS] of which some directions are much larger than others."""
    mixed = random(TOKENS, COLUMNS, seed=seed, dtype=torch.float32) @ random(COLUMNS, COLUMNS, seed=9).float()
    return mixed * torch.linspace(10, 300, COLUMNS)


def inputs_of(seen: Tensor, original: Tensor | None = None) -> Inputs:
    drift = None if original is None else (original - seen).T @ seen / TOKENS
    return Inputs(seen.T @ seen / TOKENS, drift, TOKENS)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_loses_more_than_by_search_and_all_much_less(scheme: Scheme) -> None:
    weight, inputs = random(12, COLUMNS, dtype=torch.float32), inputs_of(correlated(1))
    plain, found = (
        loss(dequantize(quantized, COLUMNS, scheme) - weight, inputs.gram)
        for quantized in (search(weight, scheme, torch.bfloat16), gptq(weight, inputs, scheme, torch.bfloat16))
    )
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < 0.6 * plain.sum()


def test_a_row_that_gptq_makes_worse_is_that_of_search(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, scheme = random(8, COLUMNS, dtype=torch.float32), inputs_of(correlated(1)), Scheme(32)
    monkeypatch.setattr(MODULE, "descended", lambda values, *rest: torch.zeros_like(values))
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


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, scale, zero = random(5, 16, dtype=torch.float32), torch.full((5, 16), 0.01), torch.zeros(5, 16)
    gram = torch.diag(torch.linspace(1, 2, 16))
    values = compensated(weight, scale, zero, gram)
    assert torch.equal(values, nearest(weight, scale, zero))
    assert torch.equal(descended(values, weight, scale, zero, gram), values)


def test_descent_loses_less() -> None:
    weight, gram = random(6, COLUMNS, dtype=torch.float32), damped(inputs_of(correlated(3)).gram)
    scale, zero = torch.full_like(weight, 0.015), torch.zeros_like(weight)
    first = compensated(weight, scale, zero, gram)
    second = descended(first, weight, scale, zero, gram)
    assert (loss(second - weight, gram) <= loss(first - weight, gram) * (1 + 1e-5)).all()
    assert loss(second - weight, gram).sum() < 0.99 * loss(first - weight, gram).sum()


def test_columns_are_made_up_for_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = random(6, COLUMNS, dtype=torch.float32), damped(inputs_of(correlated(3)).gram)
    scale, zero = torch.full_like(weight, 0.015), torch.zeros_like(weight)
    whole = compensated(weight, scale, zero, gram)
    swept = descended(whole, weight, scale, zero, gram)
    monkeypatch.setattr(MODULE, "BLOCK_COLUMNS", 24)
    lost = loss(compensated(weight, scale, zero, gram) - weight, gram).sum()
    assert lost == pytest.approx(loss(whole - weight, gram).sum().item(), rel=0.02)
    again = loss(descended(whole, weight, scale, zero, gram) - weight, gram).sum()
    assert again == pytest.approx(loss(swept - weight, gram).sum().item(), rel=0.02)


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
    assert damped(gram).diagonal().tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.full((4, 4), float("nan"))])
def test_inputs_without_a_gram_matrix_are_refused(gram: Tensor) -> None:
    with pytest.raises(CheckpointError, match="no usable gram matrix"):
        damped(gram)


def test_weighted_search_serves_large_inputs_first() -> None:
    weight, scheme = random(16, COLUMNS, dtype=torch.float32), Scheme(-1)
    seen = torch.ones(TOKENS, COLUMNS)
    seen[:, :8] = 50
    seen *= torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(seen)
    plain, found = (
        loss(dequantize(quantized, COLUMNS, scheme) - weight, inputs.gram).sum()
        for quantized in (
            search(weight, scheme, torch.bfloat16), weighted_search(weight, inputs, scheme, torch.bfloat16)
        )
    )  # fmt: skip
    assert found < 0.8 * plain
