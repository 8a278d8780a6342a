import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


from checkpoints import write_checkpoint
from local_hub import REPO, TOKEN, LocalHub


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


@pytest.fixture
def local_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Point huggingface_hub, which reads its environment once at import, at a URL; its cache is empty."""
    from huggingface_hub import close_session, constants  # here, because importing it takes a second

    settings = {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def point_at(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    close_session()
    yield point_at
    close_session()


@pytest.fixture
def hub(local_client: Callable[[str], None]) -> Iterator[LocalHub]:
    with LocalHub(REPO) as hub:
        local_client(hub.url)
        yield hub
