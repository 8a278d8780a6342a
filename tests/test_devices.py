import platform
import resource
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from formats import devices
from formats.devices import (
    BLOCK_WEIGHTS,
    block_weights,
    has_triton,
    keep_freed_memory,
    parse_device,
    parse_devices,
    room_for,
)
from formats.errors import Int4Warning, TemporaryError, UsageError


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("cuda:1", "cuda"), ("mps", "cuda"), ("xpu", "cuda")])
def test_every_kind_of_device_has_a_size_of_blocks(device: str, kind: str) -> None:
    assert block_weights(torch.device(device)) == BLOCK_WEIGHTS[kind]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(1 << 21)  # 8 MB, freed at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert keep_freed_memory()
    faults()
    assert faults() < 20 * 2048 / 4  # of 4 KB


def test_all_is_every_gpu_and_none_may_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_devices("cpu") == [torch.device("cpu")]
    with pytest.raises(UsageError, match="names one twice"):
        parse_devices("cpu,cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="there is no GPU"):
        parse_devices("all")


def test_a_name_that_is_no_device_is_told_what_is_one() -> None:
    with pytest.raises(UsageError) as caught:
        parse_device("gpu")
    assert str(caught.value) == "device 'gpu': is none; expected cpu, cuda, or cuda:N for the N-th GPU from 0"
    with pytest.raises(UsageError, match=r"'gpu': is none; expected cpu, cuda, cuda:N, several .*, or all$"):
        parse_devices("cpu,gpu")


@pytest.mark.parametrize(
    ("built", "advice"), [(None, "install a CUDA build of torch"), ("13.0", "a GPU that is there")]
)
def test_a_gpu_that_is_not_there_is_told_from_a_torch_without_any(
    monkeypatch: pytest.MonkeyPatch, built: str | None, advice: str
) -> None:
    def refuse(*rest: object, **options: object) -> None:
        raise AssertionError("No such GPU")

    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(UsageError, match=f"device 'cuda': No such GPU; .*{advice}"):
        parse_device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The name of a GPU, and none behind it."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    has_triton.cache_clear()
    yield torch.device("cuda:0")
    has_triton.cache_clear()


@pytest.mark.parametrize(("backend", "arch"), [("cuda", 70), ("cuda", 90), ("hip", "gfx942")])
def test_triton_works_for_gpus_that_it_is_made_for(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, backend: str, arch: object
) -> None:
    monkeypatch.setattr(devices, "triton_target", lambda: SimpleNamespace(backend=backend, arch=arch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has_triton(gpu)


def test_a_machine_without_a_gpu_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_triton(torch.device("cpu"))


def broken() -> object:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


def missing() -> object:
    raise ModuleNotFoundError("No module named 'triton'")


def too_old() -> object:
    return SimpleNamespace(backend="cuda", arch=61)


@pytest.mark.parametrize(
    ("find", "reason"),
    [
        (broken, "RuntimeError: Failed to find C compiler. Please specify via CC"),
        (missing, "ModuleNotFoundError: No module named 'triton'"),
        (too_old, "it needs compute capability 7.0, this GPU has 6.1"),
    ],
)
def test_a_gpu_without_triton_is_warned_of_once(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, find: object, reason: str
) -> None:
    monkeypatch.setattr(devices, "triton_target", find)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not has_triton(gpu)
        assert not has_triton(gpu)
    assert {warning.category for warning in caught} == {Int4Warning}
    assert [str(warning.message) for warning in caught] == [
        f"cuda:0: Triton does not work here ({reason}); torch does its work, many times slower"
    ]


FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 11.06 GiB is "
    "free. Including non-PyTorch memory, this process has 12.57 GiB memory in use. See documentation"
)


def test_a_full_gpu_is_an_error_with_its_sizes() -> None:
    with pytest.raises(TemporaryError) as caught, room_for("model"):
        raise torch.OutOfMemoryError(FULL)
    assert str(caught.value) == (
        "model: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which "
        "11.06 GiB is free; free some memory of the GPU, or use another device"
    )
