"""The errors that leave this project, one class per exit code of its commands, and its warnings."""

from collections.abc import Sequence


def some(names: Sequence[str]) -> str:
    """The first ten of `names` and how many more, for a message."""
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"


class Int4Error(Exception):
    """Base of every error raised on purpose; its text says where, what was found, what was expected, what to do."""

    exit_code = 1


class UsageError(Int4Error):
    """An option or argument is wrong."""

    exit_code = 2


class CheckpointError(Int4Error):
    """A checkpoint, given or made, is damaged, incomplete or of a kind that is not supported."""

    exit_code = 3


class NonFiniteError(CheckpointError):
    """A weight to be quantised is NaN or infinite."""


class HubError(Int4Error):
    """The Hub refused for good: no such repository or revision, or no right to read or write it."""

    exit_code = 4


class OutputError(Int4Error):
    """The output folder cannot be used or written."""

    exit_code = 5


class TemporaryError(Int4Error):
    """The same command may succeed later: network trouble, a busy Hub, a folder that another run holds, a full GPU."""

    exit_code = 75


class Int4Warning(UserWarning):
    """Something that the user should know and that stops nothing."""
