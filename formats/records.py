"""Frozen dataclasses from parsed JSON and back, strictly: every field present, none unknown, no type coerced.

A `flag` alone is present only where it is true: so JSON written before there was one stays what it was.
"""

import math
import types
import typing
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from formats.errors import CheckpointError
from formats.layout import MAX_SIZE

Record = TypeVar("Record")
FLAG = "flag"


def flag() -> Any:
    """A boolean field, false by default, that JSON has only where it is true."""
    return field(default=False, metadata={FLAG: True})


def to_json(record: Any) -> Any:
    """The JSON form of a record: dataclasses become objects, tuples become arrays."""
    if hasattr(record, "__dataclass_fields__"):
        held = [(field, getattr(record, field.name)) for field in fields(record)]
        return {field.name: to_json(value) for field, value in held if value or not _is_flag(field)}
    if isinstance(record, tuple):
        return [to_json(item) for item in record]
    return record


def from_json(kind: type[Record], value: Any, where: str) -> Record:
    """`value` as the dataclass `kind`, or `CheckpointError` naming the field below `where` that does not fit."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: found {_short(value)}, expected an object")
    hints = typing.get_type_hints(kind)
    flags = {field.name for field in fields(kind) if _is_flag(field)}  # type: ignore[arg-type]
    missing, unknown = sorted(set(hints) - set(value) - flags), sorted(set(value) - set(hints))
    if missing or unknown:
        raise CheckpointError(f"{where}: fields missing {missing}, unknown {unknown[:10]}; convert the model again")
    if false := sorted(name for name in flags & set(value) if value[name] is not True):
        raise CheckpointError(f"{where}.{false[0]}: found {_short(value[false[0]])}, expected true, or no such field")
    given = ((name, hint) for name, hint in hints.items() if name in value)
    return kind(**{name: _field(hint, value[name], f"{where}.{name}") for name, hint in given})


def _is_flag(field: "Field[Any]") -> bool:
    return FLAG in field.metadata


def _field(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # only `X | None` is used
        return None if value is None else _field(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise CheckpointError(f"{where}: found {_short(value)}, expected an array")
        return tuple(_field(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hasattr(hint, "__dataclass_fields__"):
        return from_json(hint, value, where)
    if type(value) is not hint:  # not isinstance: true must not pass as 1, nor 1 as 1.0
        raise CheckpointError(f"{where}: found {_short(value)}, expected {hint.__name__}")
    if (hint is int and abs(value) > MAX_SIZE) or (hint is float and not math.isfinite(value)):
        raise CheckpointError(f"{where}: found {_short(value)}, expected a number of 64 bits")
    return value


def _short(value: Any) -> str:
    return repr(value)[:80]
