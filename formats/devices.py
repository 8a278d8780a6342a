"""Which device computes, and whether Triton can."""

import ctypes
import resource
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from formats.errors import UsageError

HAS_TRITON = find_spec("triton") is not None  # not on every platform; elsewhere torch does the work

# Weights that a device works on at a time: what the cache of a CPU holds, what fills a GPU.
BLOCK_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 23}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 28


def block_weights(device: torch.device) -> int:
    """How many weights `device` works on at a time; any device that is no CPU counts as a GPU."""
    return BLOCK_WEIGHTS.get(device.type, BLOCK_WEIGHTS["cuda"])


def parse_device(name: torch.device | str | None) -> torch.device:
    """The device `name`, or without one the GPU if there is one, else the CPU.

    Raises `UsageError` for a name that means nothing, and for a device that is not there or holds no numbers.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UsageError(f"device {str(name)!r}: {reason}; use cpu, or a GPU that is there") from None
    return device


def parse_devices(names: str | None) -> list[torch.device]:
    """The devices that `names` lists, separated by commas; "all" is every GPU. Raises `UsageError`."""
    if names == "all":
        names = ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        if not names:
            raise UsageError("device 'all': there is no GPU here; use cpu")
    found = [parse_device(name) for name in (names.split(",") if names is not None else [None])]
    if len(set(found)) < len(found):
        raise UsageError(f"devices {names!r}: names one twice")
    return found


def keep_freed_memory() -> bool:
    """Have the C library use freed memory again, where that is glibc; whether it is.

    By default it gives blocks of some megabytes back, and every temporary tensor is faulted in anew: on two cores a
    conversion takes a third longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, KEPT_BYTES) for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))


def peak_memory(devices: Sequence[torch.device]) -> tuple[int, int]:
    """The most bytes that this process held so far: on the host, and what torch allocated on any GPU of `devices`."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpus = [torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"]
    return host, max(gpus, default=0)
