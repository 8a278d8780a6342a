"""How every command of this project prints, and how it ends: one line on stderr and the documented exit code."""

import os
import signal
import sys
import warnings
from types import FrameType
from typing import Any, NoReturn

import click
from tqdm import tqdm

from formats.errors import Int4Error, Int4Warning, OutputError

INTERRUPTED, TERMINATED = 130, 143
MAX_LINE = 1000


def printable(text: str) -> str:
    """`text` from a file as one line of bounded length, in which a terminal finds no commands."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: MAX_LINE + 1])
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


def echo(text: str) -> None:
    """Print `text` on standard output; raises `OutputError` when that is a closed pipe or a full disk."""
    try:
        click.echo(text)
    except OSError as error:
        # What is still in the buffer goes nowhere, else Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"standard output: cannot be written ({error.strerror}); is its reader gone?") from None


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that nothing half-made stays; a second signal of the kind does not wait for that."""
    signal.signal(signum, signal.SIG_DFL)
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(TERMINATED)


def _show_ours(show: Any) -> Any:
    """`show`, by which Python prints warnings, but of ours a line, above the bars of progress."""

    def shown(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, Int4Warning):
            tqdm.write(f"warning: {printable(str(message))}", file=sys.stderr)
        else:
            show(message, category, *rest)

    return shown


def run(command: click.Command, *, once_stopped: str = "") -> NoReturn:
    """Run `command` with the arguments of the process and exit; `once_stopped` says what to do after a signal."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
            signal.signal(signum, _stop)
    warnings.showwarning = _show_ours(warnings.showwarning)
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Int4Error as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"interrupted{once_stopped}", err=True)
        sys.exit(INTERRUPTED)
    except SystemExit:
        click.echo(f"terminated{once_stopped}", err=True)
        raise
    sys.exit(0)
