"""How every command of this project ends: one line on stderr and the documented exit code."""

import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from formats.errors import Int4Error, OutputError

INTERRUPTED, TERMINATED = 130, 143


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
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # else Python complains about the pipe once more while it exits
        sys.exit(OutputError.exit_code)
    sys.exit(0)
