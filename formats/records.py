"""Frozen dataclasses from parsed JSON and back, strictly: every field present, none unknown, no type coerced."""

import math
import types
import typing
from dataclasses import fields
from typing import Any, TypeVar

from formats.errors import CheckpointError
from formats.layout import MAX_SIZE

Record = TypeVar("Record")


def to_json(record: Any) -> Any:
    """The JSON form of a record: dataclasses become objects, tuples become arrays."""
    if hasattr(record, "__dataclass_fields__"):
        return {field.name: to_json(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, tuple):
        return [to_json(item) for item in record]
    return record


def from_json(kind: type[Record], value: Any, where: str) -> Record:
    """`value` as the dataclass `kind`, or `CheckpointError` naming the field below `where` that does not fit."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: found {_short(value)}, expected an object")
    hints = typing.get_type_hints(kind)
    if set(value) != set(hints):
        missing, unknown = sorted(set(hints) - set(value)), sorted(set(value) - set(hints))
        raise CheckpointError(f"{where}: fields missing {missing}, unknown {unknown[:10]}; convert the model again")
    return kind(**{name: _field(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


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
