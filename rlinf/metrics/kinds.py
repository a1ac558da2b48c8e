"""What a field of a record is to hold, so that a record file which somebody changed is told by file, line and field."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Kind:
    """name: as a message says it, `a string`."""

    name: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    """JSON's NaN and Infinity are floats too; a whole number of hundreds of digits is none."""
    return isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)


TEXT = Kind("a string", lambda value: isinstance(value, str))
NUMBER = Kind("a number", _is_number)
WHOLE = Kind("a whole number from 0", lambda value: type(value) is int and 0 <= value <= sys.maxsize)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NUMBERS = Kind("an object of numbers", lambda value: isinstance(value, dict) and all(map(_is_number, value.values())))
TEXTS = Kind("a list of strings", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
PAIRS = Kind("a list of pairs of whole numbers", lambda value: isinstance(value, list) and all(map(_is_pair, value)))


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.name} or null", lambda value: value is None or kind.holds(value))


def misfit(row: Mapping[str, Any], fields: Mapping[str, Kind]) -> str | None:
    """What is wrong with the first field that is missing or holds something else; None when every field is as it should be."""
    for name, kind in fields.items():
        if name not in row:
            return f"no field `{name}`"
        if not kind.holds(row[name]):
            shown = json.dumps(row[name], default=str)
            return f"`{name}` is {shown if len(shown) <= SHOWN else shown[:SHOWN] + '…'}, not {kind.name}"
    return None
