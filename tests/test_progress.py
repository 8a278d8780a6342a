"""How progress is shown: a bar on a terminal, lines in a log, nothing where that is asked for."""

import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from checkpoints import EXAMPLE

from formats import hub, progress
from formats.progress import Bar, Lines, NoBar, bar_class, draws_bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in an element that a test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def lines_of(clock: list[float], steps: list[tuple[float, int]], **options: object) -> list[str]:
    log = io.StringIO()
    with Lines(file=log, desc="model", **options) as bar:
        for seconds, n in steps:
            clock[0] += seconds
            bar.update(n)
    return log.getvalue().splitlines()


def test_lines_come_with_every_tenth_but_not_too_often(clock: list[float]) -> None:
    steps = [(5, 20), (5, 1), (9, 70), (1, 1), (20, 5), (10, 1)]
    assert lines_of(clock, steps, total=100, unit="B", unit_scale=True) == [
        "model: 21% of 100, 2.10B/s, 00:37 left",
        "model: 92% of 100, 4.60B/s, 00:01 left",
        "model: 98% of 100, 1.96B/s, 00:01 left",
    ]


def test_a_log_shows_life_although_little_is_done(clock: list[float]) -> None:
    assert len(lines_of(clock, [(30, 1), (29, 1), (1, 1)], total=1000)) == 2


def test_a_line_says_how_much_where_nobody_knows_of_how_much(clock: list[float]) -> None:
    assert lines_of(clock, [(60, 3)], unit="layer") == ["model: 3, 20.00s/layer"]


def test_short_work_leaves_no_lines(clock: list[float]) -> None:
    assert lines_of(clock, [(1, 50), (1, 50)], total=100) == []


def test_lines_survive_what_is_meant_for_bars(clock: list[float]) -> None:
    log = io.StringIO()
    bar = Lines(file=log, total=10)
    bar.set_postfix(error=1)
    bar.clear()
    bar.refresh()
    bar.close()
    assert log.getvalue() == ""


def test_how_progress_is_shown_depends_on_who_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(progress.SILENCED, raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert (bar_class(), bar_class(quiet=True), draws_bars()) == (Lines, NoBar, False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert (bar_class(), bar_class(quiet=True), draws_bars()) == (Bar, NoBar, True)


@pytest.mark.parametrize(("value", "kind"), [("1", NoBar), ("true", NoBar), ("0", Bar), ("", Bar)])
def test_the_variable_of_the_hub_silences_everything(
    monkeypatch: pytest.MonkeyPatch, value: str, kind: type[Bar]
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", value)
    assert bar_class() is kind


def test_downloads_are_shown_as_everything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[object] = []

    def snapshot_download(*args: object, tqdm_class: object, **kwargs: object) -> str:
        seen.append(tqdm_class)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    hub.download("owner/name")
    hub.download("owner/name", quiet=True)
    assert seen == [Lines, NoBar]


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """What a command writes on stderr where that is a terminal."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name != progress.SILENCED}
    command = [sys.executable, "-m", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writer, env=variables | environment)
    os.close(writer)
    written = b""
    try:
        while piece := os.read(reader, 1 << 16):
            written += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(reader)
    assert process.wait() == 0
    return written.decode()


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_is_shown_a_bar_without_colours(tmp_path: Path, environment: dict[str, str]) -> None:
    written = on_a_terminal(["converter", str(EXAMPLE), str(tmp_path / "out"), "--method", "absmax"], **environment)
    assert "tiny-llama: 100%" in written
    assert not re.search(r"\x1b\[[0-9;]*m", written)
