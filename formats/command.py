"""How every command of this project prints, and how it ends: one line on stderr and the documented exit code."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from formats.errors import Int4Error, OutputError

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


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)  # unwinds, so that nothing half-made stays


def run(command: click.Command) -> NoReturn:
    """Run `command` with the arguments of the process and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Int4Error as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(0)
