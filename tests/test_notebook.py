"""The notebook of examples: every cell runs, and what is stored in it is what comes out."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import EXAMPLE

NOTEBOOK = EXAMPLE.parent / "quickstart.ipynb"
COMMANDS = {"int4-convert": "converter", "int4-inspect": "formats", "int4-eval": "runtime"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the examples as the working directory, with the commands on the path, whether installed or not."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, package in COMMANDS.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {package} "$@"\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE.parents[1]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what is stored was made on a CPU
    for name in ("COLUMNS", "HF_HUB_DISABLE_PROGRESS_BARS"):  # the notebook sets them
        monkeypatch.setenv(name, "")
    shutil.copytree(EXAMPLE.parent, tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    return tmp_path / "examples"


def run(cell: str, names: dict[str, object]) -> str:
    """What a cell prints: of Python, or of one command behind an exclamation mark."""
    if cell.startswith("!"):
        return subprocess.run(cell[1:], shell=True, check=True, stdout=subprocess.PIPE, text=True).stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(cell, NOTEBOOK.name, "exec"), names)
    return printed.getvalue()


def shape_of(text: str) -> str:
    """`text` without what differs from machine to machine and from run to run: digits, and the blanks beside them."""
    return re.sub(r" *[\d,]*\d", "#", text)


def test_every_cell_gives_what_is_stored(place: Path) -> None:
    pytest.importorskip("transformers")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        stored = "".join("".join(output["text"]) for output in cell["outputs"])
        assert shape_of(run("".join(cell["source"]), names)) == shape_of(stored)
    assert (place / "quickstart-out" / "manifest.json").is_file()
    assert len(cells) == 6
