"""The examples of docstrings, which the documentation shows, run as they stand."""

import textwrap
from pathlib import Path

import pytest
from checkpoints import EXAMPLE

import converter
from formats.checkpoint import Checkpoint


def test_example_of_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = textwrap.dedent(str(converter.__doc__).partition("::\n")[2])
    exec(example.replace("folder-or-hub-id", str(EXAMPLE)), {})
    rows = Checkpoint(tmp_path / "out").manifest.tensors
    quantised = {row.name for row in rows if row.quantized}
    assert quantised == {row.name for row in rows if "_proj" in row.name and "down_proj" not in row.name}
