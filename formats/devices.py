"""Which device computes, whether Triton can, and what becomes of a GPU that is full."""

import ctypes
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from formats.errors import Int4Warning, TemporaryError, UsageError

LEAST_CAPABILITY = 70  # 10 times that of an NVIDIA GPU; for older ones ptxas refuses what Triton makes of our kernels

# Weights that a device works on at a time: what the cache of a CPU holds, what fills a GPU.
BLOCK_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 23}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 28


def block_weights(device: torch.device) -> int:
    """How many weights `device` works on at a time; any device that is no CPU counts as a GPU."""
    return BLOCK_WEIGHTS.get(device.type, BLOCK_WEIGHTS["cuda"])


def parse_device(
    name: torch.device | str | None, *, expected: str = "cpu, cuda, or cuda:N for the N-th GPU from 0"
) -> torch.device:
    """The device `name`, or without one the GPU if there is one, else the CPU.

    Raises `UsageError` for a name that means nothing, where others were `expected`, and for a device that is not there
    or holds no numbers.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # whose text lists the inside of torch
        raise UsageError(f"device {str(name)!r}: is none; expected {expected}") from None
    try:
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:120]
        built = torch.version.cuda or torch.version.hip
        usual = "use cpu, or a GPU that is there"
        advice = usual if built or device.type != "cuda" else "install a CUDA build of torch, or use cpu"
        raise UsageError(f"device {str(name)!r}: {reason}; {advice}") from None
    return device


def parse_devices(names: str | None) -> list[torch.device]:
    """The devices that `names` lists, separated by commas; "all" is every GPU. Raises `UsageError`."""
    if names == "all":
        names = ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        if not names:
            raise UsageError("device 'all': there is no GPU here; use cpu")
    one = partial(parse_device, expected="cpu, cuda, cuda:N, several of these with commas between them, or all")
    found = [one(name) for name in (names.split(",") if names is not None else [None])]
    if len(set(found)) < len(found):
        raise UsageError(f"devices {names!r}: names one twice")
    return found


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton makes kernels for `device`; elsewhere torch does the work, which for a GPU a warning says once."""
    if device.type != "cuda":
        return False
    try:
        with torch.cuda.device(device):
            target = triton_target()
    except Exception as error:  # not installed, or broken, or without a C compiler: whatever comes of it
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    else:
        if target.backend != "cuda" or target.arch >= LEAST_CAPABILITY:
            return True
        reason = f"it needs compute capability {LEAST_CAPABILITY / 10}, this GPU has {target.arch / 10}"
    warnings.warn(
        f"{device}: Triton does not work here ({reason}); torch does its work, many times slower",
        Int4Warning,
        stacklevel=2,
    )
    return False


def triton_target() -> Any:
    """What Triton compiles for on the current GPU; finding out takes all of its parts but the compiler itself."""
    from triton.runtime import driver

    return driver.active.get_current_target()


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Inside, a GPU without enough memory is a `TemporaryError` about `what`, with the sizes that torch gives."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        sizes = ". ".join(str(error).split(". ")[:3])
        raise TemporaryError(f"{what}: {sizes}; free some memory of the GPU, or use another device") from None


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
