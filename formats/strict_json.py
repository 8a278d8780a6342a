"""JSON without its ambiguities: no duplicate keys, no NaN, no unbounded nesting, one canonical text."""

import json
from collections import Counter
from typing import Any, NoReturn

from formats.errors import CheckpointError


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {twice!r}")
    return parsed


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_object(raw: bytes, where: str, *, constants: bool = False) -> dict[str, Any]:
    """Parse `raw` as one JSON object, or raise `CheckpointError` naming `where`.

    `constants` admits Python's NaN and Infinity, which some model configurations hold.
    """
    constant = float if constants else _refuse_constant
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_duplicates, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); fetch or convert it again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where}: found a JSON {type(parsed).__name__}, expected an object")
    return parsed


def canonical(value: Any) -> bytes:
    """The one text of `value`: sorted keys, two spaces of indent, ASCII, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def readable(value: Any) -> bytes:
    """A text of `value` for files that other programs have too: keys as they stand, two spaces of indent."""
    return (json.dumps(value, indent=2) + "\n").encode()
