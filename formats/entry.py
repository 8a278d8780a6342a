"""Where the commands begin: what a signal does is settled before anything slow is imported.

The commands of all rooms begin here, because to import `runtime` is slow itself; they are named, not imported.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NoReturn

INTERRUPTED, TERMINATED = 130, 143
WORDS = {INTERRUPTED: "interrupted", TERMINATED: "terminated"}


def convert() -> NoReturn:
    """Entry point of `int4-convert`."""
    start("converter.cli")


def export() -> NoReturn:
    """Entry point of `int4-export`."""
    start("converter.export_cli")


def push() -> NoReturn:
    """Entry point of `int4-push`."""
    start("converter.push_cli")


def inspect() -> NoReturn:
    """Entry point of `int4-inspect`."""
    start("formats.cli")


def evaluate() -> NoReturn:
    """Entry point of `int4-eval`."""
    start("runtime.cli")


def start(module: str) -> NoReturn:
    """Import a module, which takes seconds where torch is in it, and call its `main`; a signal until then ends all."""
    _handle_signals(_end)
    main: Callable[[], NoReturn] = import_module(module).main
    main()


@contextmanager
def stoppable(once_stopped: str = "") -> Iterator[None]:
    """Inside, and from then on, SIGINT and SIGTERM unwind; what comes here of it ends the process with a word.

    `once_stopped` says what to do then.
    """
    _handle_signals(_stop)
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{WORDS[INTERRUPTED]}{once_stopped}\n")
        sys.exit(INTERRUPTED)
    except SystemExit as ended:
        if ended.code == TERMINATED:
            sys.stderr.write(f"{WORDS[TERMINATED]}{once_stopped}\n")
        raise


def _handle_signals(handler: Callable[[int, FrameType | None], NoReturn]) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
            signal.signal(signum, handler)


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    """End at once: nothing is half-made yet, and libraries swallow what is raised while they are imported."""
    code = 128 + signum
    os.write(sys.stderr.fileno(), f"{WORDS[code]}\n".encode())
    os._exit(code)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that nothing half-made stays; a second signal of the kind does not wait for that."""
    signal.signal(signum, signal.SIG_DFL)
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(TERMINATED)
