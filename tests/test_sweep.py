import pytest
import torch
from checkpoints import random
from torch import Tensor

from converter.quantize.sweep import by_torch, sweep

kernels = pytest.importorskip("converter.quantize.kernels.sweep", reason="Triton is not on this platform")

Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def block(rows: int, columns: int) -> Block:
    """Wanted, before, pull, scale and zero of a block, a part of larger matrices as in a sweep."""
    wide, earlier = (random(rows, columns + 24, dtype=torch.float32, seed=seed) for seed in (1, 2))
    pull = random(columns + 24, columns, dtype=torch.float32, seed=3).T * 0.1  # as Cholesky's factors lie
    scale = random(rows, columns, dtype=torch.float32, seed=4).T
    scale = torch.where(scale.abs() < 1e-3, 1e-3, scale)
    zero = torch.arange(columns * rows).view(columns, rows) % 16 - 8.0
    return wide[:, 8 : columns + 8], earlier[:, 16 : columns + 16], pull[:, :columns], scale, zero


def same_as_torch(rows: int, columns: int, has_before: bool, device: str) -> None:
    wanted, before, pull, scale, zero = block(rows, columns)
    earlier = before if has_before else None
    found, expected = wanted.to(device, copy=True), wanted.clone()
    lost = kernels.sweep_block(
        found, None if earlier is None else earlier.to(device), pull.to(device), scale.to(device), zero.to(device)
    )
    assert torch.equal(lost.cpu(), by_torch(expected, earlier, pull, scale, zero))
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(expected, wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("has_before", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (20, 32), (17, 24)])
def test_kernel_gives_torchs_bits(rows: int, columns: int, has_before: bool) -> None:
    same_as_torch(rows, columns, has_before, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("has_before", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (1030, 128), (4096, 104)])
def test_a_gpu_gives_the_same(rows: int, columns: int, has_before: bool) -> None:
    same_as_torch(rows, columns, has_before, "cuda")


def test_what_a_column_loses_is_made_up_for_behind_it() -> None:
    # Two columns that always come together: what the first rounds off, the second takes.
    wanted = torch.tensor([[0.4, 0.4], [-0.3, 2.2]])
    pull = torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    ones, groups = torch.ones(1, 2), torch.zeros(2, dtype=torch.int64)
    values = sweep(wanted, None, lambda start, end: pull[start:end, start:], ones, torch.zeros(1, 2), groups)
    assert values.tolist() == [[0, 1], [0, 2]]


def test_blocks_make_up_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, before, pull, scale, zero = block(9, 40)
    groups = torch.arange(40)
    whole = sweep(wanted.clone(), before, lambda start, end: pull[start:end, start:], scale, zero, groups)
    monkeypatch.setattr("converter.quantize.sweep.BLOCK_COLUMNS", 16)
    parts = sweep(wanted.clone(), before, lambda start, end: pull[start:end, start:], scale, zero, groups)
    assert torch.isclose(whole, parts).float().mean() > 0.9  # sums of another order may round the other way
