import json
from pathlib import Path

import pytest
import torch
from checkpoints import random
from click.testing import CliRunner
from torch import Tensor

from converter.cli import command
from converter.quantize.search import search
from formats import codec
from formats.devices import BLOCK_WEIGHTS
from formats.errors import NonFiniteError
from formats.layout import CODE_MAX, CODE_MIN, Scheme

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llama"


def loss(weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """As `error_of`, with codes by the codec and no zero points."""
    codes = codec.pack(codec.encode(weight.float(), scale, None, scheme))
    return error_of(weight, codec.Quantized(codes, scale, None), scheme)


def error_of(weight: Tensor, quantized: codec.Quantized, scheme: Scheme) -> Tensor:
    """Σ (σ + |w|) · (w − ŵ)² of each group [N, G] in fp64."""
    w = codec.grouped(weight.double(), scheme)
    values = codec.grouped(codec.dequantize(quantized, weight.shape[1], scheme).double(), scheme)
    width = scheme.group_width(weight.shape[1])
    columns = torch.full((w.shape[1],), width)
    columns[-1] = weight.shape[1] - width * (w.shape[1] - 1)
    sigma = (w.square().sum(-1) / columns).sqrt()
    return ((sigma.unsqueeze(-1) + w.abs()) * (w - values).square()).sum(-1)


def signed_max(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The scale by which the largest weight of each group has code −8."""
    groups = codec.grouped(weight.float(), scheme)
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1).div(CODE_MIN).to(dtype)


@pytest.mark.parametrize(("rows", "columns", "size"), [(37, 172, -1), (5, 300, 24), (18, 520, 256), (64, 512, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_group_is_worse_than_with_signed_max_or_absmax(
    rows: int, columns: int, size: int, dtype: torch.dtype
) -> None:
    weight, scheme = random(rows, columns, dtype=dtype, seed=rows), Scheme(size)
    found = loss(weight, search(weight, scheme, dtype).scale, scheme)
    assert (found <= loss(weight, signed_max(weight, scheme, dtype), scheme) * (1 + 1e-5)).all()
    assert found.sum() < 0.8 * loss(weight, codec.quantize(weight, scheme, dtype).scale, scheme).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_other_scale_is_much_better(symmetric: bool) -> None:
    weight, scheme = random(20, 128, seed=3), Scheme(128, symmetric)
    found = error_of(weight, search(weight, scheme, torch.bfloat16), scheme).flatten()
    for row, least in zip(weight.double(), found, strict=True):
        w, importance = row.float()[None], row.square().mean().sqrt() + row.abs()
        base, zero = codec.absmax(w, Scheme(-1, symmetric), torch.bfloat16)
        zeros = [0] if zero is None else range(max(int(zero) - 2, CODE_MIN), min(int(zero) + 2, CODE_MAX) + 1)
        errors = []
        for scale in (base.double() * torch.linspace(0.5, 1.2, 400)).bfloat16().double().unique():
            for sign in (1, -1) if symmetric else (1,):
                for shift in zeros:
                    codes = ((row / (sign * scale)).round() + shift).clamp(CODE_MIN, CODE_MAX) - shift
                    errors.append((importance * (row - codes * sign * scale).square()).sum())
        assert least <= 1.02 * min(errors)


def test_codes_are_those_of_the_stored_scales() -> None:
    weight, scheme = random(16, 300), Scheme(64)
    found = search(weight, scheme, torch.bfloat16)
    assert (found.scale < 0).any()
    assert (found.scale > 0).any()
    assert torch.equal(found.packed, codec.pack(codec.encode(weight.float(), found.scale, None, scheme)))


@pytest.mark.parametrize("size", [1, 1 << 9, 1 << 30])
def test_the_result_does_not_depend_on_the_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = random(9, 300), Scheme(64)
    expected = search(weight, scheme, torch.bfloat16)
    monkeypatch.setitem(BLOCK_WEIGHTS, "cpu", size)
    assert torch.equal(search(weight, scheme, torch.bfloat16).scale, expected.scale)


CASES = [(37, 172, -1), (256, 4096, 128), (18, 520, 256), (9, 300, 24), (3, 9000, -1), (2, 40_000, -1)]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "size"), CASES)
def test_a_gpu_finds_the_same(rows: int, columns: int, size: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight, scheme = random(rows, columns, dtype=dtype), Scheme(size, symmetric)
    scale_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    expected = search(weight, scheme, scale_dtype)
    found = search(weight.cuda(), scheme, scale_dtype)
    for one, other in zip(expected.tensors(), found.tensors(), strict=True):
        assert torch.equal(one, other.cpu())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "size"), [(5, 172, -1), (9, 300, 24), (4, 512, 128), (1, 2100, -1)])
def test_the_kernel_finds_the_same(rows: int, columns: int, size: int, symmetric: bool) -> None:
    kernels = pytest.importorskip("converter.quantize.kernels", reason="Triton is not on this platform")
    weight, scheme = random(rows, columns, dtype=torch.float16), Scheme(size, symmetric)
    expected = search(weight, scheme, torch.float16)
    found = kernels.search(weight, scheme, torch.float16)
    for one, other in zip(expected.tensors(), found.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-30, 3e38])
def test_a_scale_is_a_number_and_not_0_at_the_ends_of_the_range(value: float, symmetric: bool) -> None:
    weight = torch.full((2, 16), value)
    weight[1, 8:] = 0
    found = search(weight, Scheme(8, symmetric), torch.bfloat16)
    codec.check_scale(found.scale)
    if value == 0:
        assert (found.scale == 1).all()


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = random(4, 16)
    weight[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="row 2, column 3"):
        search(weight, Scheme(8), torch.bfloat16)


@pytest.mark.parametrize(("rows", "columns", "size"), [(37, 172, -1), (18, 520, 256), (64, 512, 64)])
def test_zero_points_lose_less_than_those_of_min_and_max(rows: int, columns: int, size: int) -> None:
    weight, scheme = random(rows, columns, seed=rows) + 0.01, Scheme(size, symmetric=False)
    plain, found = (method(weight, scheme, torch.bfloat16) for method in (codec.quantize, search))
    before, after = (error_of(weight, quantized, scheme) for quantized in (plain, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()


def test_the_command_takes_the_method(tmp_path: Path) -> None:
    arguments = [str(EXAMPLE), str(tmp_path / "out"), "--method", "search", "--device", "cpu", "--quiet"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(next((tmp_path / "out").glob("*manifest*.json")).read_text())["recipe"]["method"] == "search"
