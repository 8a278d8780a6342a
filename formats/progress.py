"""Progress: a bar on a terminal, elsewhere a plain line now and then, so that a log shows life."""

import os
import sys
import time
from typing import Any

from tqdm.asyncio import tqdm_asyncio

SILENCED = "HF_HUB_DISABLE_PROGRESS_BARS"
PAUSE, PATIENCE = 10.0, 30.0  # seconds: lines keep the one apart, and come after the other whatever was done
LINE = "{percentage:.0f}% of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
LINE_WITHOUT_TOTAL = "{n_fmt}, {rate_fmt}{postfix}"


class Bar(tqdm_asyncio):  # type: ignore[type-arg]
    """What every command shows of its progress; the classes below show it otherwise."""


class Lines(Bar):
    """A line when a tenth more is done, but not within `PAUSE` seconds, or when `PATIENCE` has passed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._said = time.time(), kwargs.get("initial", 0)  # when, and how much was done then
        # gui: the text is ours, not tqdm's; its other numbers have it ask at every step whether a line is due.
        super().__init__(*args, **{**kwargs, "gui": True, "mininterval": 0, "miniters": 1, "smoothing": 0})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line where one is due."""
        now = time.time()
        waited, more = now - self._said[0], self.n - self._said[1]
        if waited >= PATIENCE or (waited >= PAUSE and self.total and more >= self.total / 10):
            self._said = now, self.n
            form = LINE if self.total else LINE_WITHOUT_TOTAL
            name = f"{self.desc.removesuffix(': ')}: " if self.desc else ""
            self.fp.write(name + self.format_meter(**{**self.format_dict, "bar_format": form}) + "\n")
            self.fp.flush()

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a line that was printed stays."""


class NoBar(Bar):
    """Silence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def draws_bars(quiet: bool = False) -> bool:
    """Whether libraries with bars of their own may draw them: on a terminal, unless that is silenced."""
    return bar_class(quiet) is Bar


def bar_class(quiet: bool = False) -> type[Bar]:
    """How this process shows progress: not at all if `quiet` or the Hub's variable says so, else as it is watched."""
    if quiet or os.environ.get(SILENCED, "").upper() in ("1", "ON", "YES", "TRUE"):
        return NoBar
    return Bar if sys.stderr.isatty() else Lines
