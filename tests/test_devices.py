import platform
import resource

import pytest
import torch

from formats.devices import BLOCK_WEIGHTS, block_weights, keep_freed_memory, parse_devices
from formats.errors import UsageError


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
