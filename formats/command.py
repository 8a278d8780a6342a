"""How every command of this project explains itself, prints and ends: with the documented exit code."""

import errno
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from formats.entry import stoppable
from formats.errors import Int4Error, Int4Warning, OutputError
from formats.progress import Bar

MAX_LINE = 1000
HELP_WIDTH = 100  # columns at most, of a terminal that has them
NAME_WIDTH = 30  # columns of an option in the help; what is longer has its explanation below it

quiet_option = click.option(
    "--quiet", is_flag=True, help="Print nothing but warnings and errors, and what --json asks for."
)


class Command(click.Command):
    """A command whose help has its options under the headings of `groups`, and examples.

    `groups` names options as they are typed; those that it does not name come last. `examples` has command lines by
    what they do. Raises `ValueError` for an option in `groups` that there is not.
    """

    def __init__(
        self,
        name: str,
        *,
        examples: Mapping[str, str],
        groups: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        settings = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": HELP_WIDTH}
        super().__init__(name, context_settings=settings, no_args_is_help=True, **kwargs)
        self.heading_of = {name: heading for heading, names in (groups or {}).items() for name in names}
        self.examples = examples
        if unknown := self.heading_of.keys() - {name for param in self.params for name in param.opts}:
            raise ValueError(f"{self.name}: groups name {sorted(unknown)}, which are no options")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group, with their explanations in one column."""
        last = "Other options" if self.heading_of else "Options"
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in [*self.heading_of.values(), last]}
        for param in self.get_params(ctx):
            record = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
            if record is not None:
                heading = next((self.heading_of[name] for name in param.opts if name in self.heading_of), last)
                sections[heading].append(record)
        lengths = [len(name) for records in sections.values() for name, _ in records]
        width = max(length for length in lengths if length <= NAME_WIDTH)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in records], col_max=width)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, as they are to be typed."""
        with formatter.section("Examples"):
            for what, line in self.examples.items():
                formatter.write(f"  # {what}\n  {line}\n")


def complete_folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Have the shell complete a folder, where a Hub id may stand too."""
    return [CompletionItem(incomplete, type="dir")]


def printable(text: str) -> str:
    """`text` from a file as one line of bounded length, in which a terminal finds no commands."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: MAX_LINE + 1])
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


def echo(text: str) -> None:
    """Print `text` on standard output; raises `OutputError` when that cannot be written, as on a full disk.

    Where its reader has gone, who had enough, the process ends with the same exit code and without a word.
    """
    try:
        click.echo(text)
    except OSError as error:
        # What is still in the buffer goes nowhere, else Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            sys.exit(OutputError.exit_code)
        raise OutputError(f"standard output: cannot be written ({error.strerror}); free some space there") from None


def _show_ours(show: Any) -> Any:
    """`show`, by which Python prints warnings, but of ours a line, above the bars of progress."""

    def shown(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, Int4Warning):
            Bar.write(f"warning: {printable(str(message))}", file=sys.stderr)
        else:
            show(message, category, *rest)

    return shown


def run(command: click.Command, *, once_stopped: str = "") -> NoReturn:
    """Run `command` with the arguments of the process and exit; `once_stopped` says what to do after a signal."""
    warnings.showwarning = _show_ours(warnings.showwarning)
    with stoppable(once_stopped):
        try:
            command.main(standalone_mode=False)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except Int4Error as error:
            click.echo(f"error: {printable(str(error))}", err=True)
            sys.exit(error.exit_code)
        except click.Abort:  # what click makes of Ctrl-C, on a new line
            raise KeyboardInterrupt from None
    sys.exit(0)
