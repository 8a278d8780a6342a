import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


from checkpoints import write_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN or a pattern, so that an element that a kernel forgets shows."""
    new_empty = torch.Tensor.new_empty

    def poison(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x55)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
