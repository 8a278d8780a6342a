"""What the benchmarks print for people and write for programs."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def line(columns: Mapping[str, int], cells: Iterable[object] = ()) -> str:
    """`cells`, or else the titles, to the right of columns of these widths; the last cells may be left out."""
    return " ".join(f"{cell:>{width}}" for cell, width in zip(list(cells) or columns, columns.values(), strict=False))


def write(path: Path | None, records: Iterable[Mapping[str, Any]]) -> None:
    """A JSON list with a record a line, if there is a file to write it to."""
    if path is not None:
        path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
