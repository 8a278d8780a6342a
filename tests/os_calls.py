"""Calls to the operating system, so that something can happen at any of them: an error, or the end of the process."""

import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from checkpoints import convert_folder

CALLS = ("open", "pread", "preadv", "pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir", "ftruncate", "fstat")


def watched(act: Callable[[int, str], object]) -> dict[str, Callable[..., Any]]:
    """The functions of `os` by their names; each call, in any thread, first does `act` with its number and name."""
    lock, numbers = Lock(), count(1)

    def watching(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            with lock:
                act(next(numbers), name)
            return call(*args, **kwargs)

        return made

    return {name: watching(name, getattr(os, name)) for name in CALLS}


def convert_until(source: Path, out: Path, moment: int) -> None:
    """Convert in a process of its own, which SIGKILL ends before its call number `moment`."""

    def die(number: int, name: str) -> None:
        if number == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    for name, call in watched(die).items():
        setattr(os, name, call)
    convert_folder(source, out)
