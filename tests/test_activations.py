import pytest
import torch
from checkpoints import random

from formats.errors import UsageError
from formats.layout import Scheme
from runtime.activations import LARGEST, rounded_to_fp8, to_fp8
from runtime.linear import Int4Linear
from runtime.ops import FP8_TOKENS


def test_the_largest_value_of_a_token_is_the_largest_of_e4m3() -> None:
    x = random(5, 64, seed=1, dtype=torch.bfloat16) * torch.tensor([1e-6, 1e-3, 1, 1e3, 1e6])[:, None]
    codes, scale = to_fp8(x)
    assert torch.equal(codes.float().abs().amax(1), torch.full((5,), LARGEST))
    torch.testing.assert_close(scale * LARGEST, x.float().abs().amax(1))


def test_rounding_is_off_by_half_a_step_of_three_bits_at_most() -> None:
    x = random(8, 256, seed=2, dtype=torch.float32)
    codes, scale = to_fp8(x)
    normal = codes.float().abs() >= 2.0**-6
    error = ((codes.float() * scale[:, None] - x).abs() / x.abs())[normal]
    assert error.max() <= 2.0**-4 * 1.01
    assert error.max() > 2.0**-5


def test_a_token_of_zeros_stays_one() -> None:
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    assert torch.equal(rounded_to_fp8(x), x)


@pytest.mark.parametrize(("tokens", "rounded"), [(FP8_TOKENS, True), (FP8_TOKENS - 1, False)])
def test_a_layer_rounds_many_tokens_alone(tokens: int, rounded: bool) -> None:
    linear = torch.nn.Linear(64, 32, dtype=torch.float32)
    layer = Int4Linear.from_linear(linear, Scheme(32), "fp8").requires_grad_(False)
    plain = Int4Linear.from_linear(linear, Scheme(32)).requires_grad_(False)
    x = random(2, tokens // 2 + 1, 64, seed=3, dtype=torch.float32).flatten(0, 1)[:tokens]
    assert torch.equal(layer(x), plain(rounded_to_fp8(x) if rounded else x))


def test_gradients_pass_the_rounding_by() -> None:
    linear = torch.nn.Linear(64, 32, dtype=torch.float32)
    layer = Int4Linear.from_linear(linear, Scheme(32), "fp8")
    x = random(FP8_TOKENS, 64, seed=4, dtype=torch.float32).requires_grad_()
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(found, layer.dequantize().sum(0).expand_as(x))


def test_unknown_activations_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'int8' is not known; expected one of None, 'fp8'"):
        Int4Linear(64, 32, Scheme(32), activations="int8")
