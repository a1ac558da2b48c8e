"""Reads record files: JSON lines that a run wrote, with every field checked.

The last line of a run that died may be torn, and is left out. For a line that a person or a power cut has changed, the error names file,
line and field.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf.errors import UserError

SHOWN = 60  # characters of a value
REMEDY = "take that line out, and keep a copy of the file"


@dataclass(frozen=True)
class Kind:
    """What a field of a record must hold. name: as in messages, `a string`."""

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
    """What is wrong with the first field that is missing or of another kind; None when all fields are right."""
    for name, kind in fields.items():
        if name not in row:
            return f"no field `{name}`"
        if not kind.holds(row[name]):
            shown = json.dumps(row[name], default=str)
            return f"`{name}` is {shown if len(shown) <= SHOWN else shown[:SHOWN] + '…'}, not {kind.name}"
    return None


def whole_rows(path: Path, fields: Mapping[str, Kind] | None = None) -> list[dict[str, Any]]:
    """The objects of all complete lines. fields: what each must have.

    Raises UserError that names the first line which is not such an object, as after a power cut.
    """
    rows = []
    for number, line in enumerate(whole_lines(path)[0], 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise damaged(path, number, f"not JSON ({error})") from error
        if not isinstance(rows[-1], dict):
            raise damaged(path, number, "not a JSON object")
        if "\\ud" in line.lower() and not _is_text(rows[-1]):
            raise damaged(path, number, "half a surrogate pair, which is no character")
        if wrong := misfit(rows[-1], fields or {}):
            raise damaged(path, number, wrong)
    return rows


def _is_text(row: Mapping[str, Any]) -> bool:
    """Whether its strings can be written as UTF-8: JSON can escape half a surrogate pair too."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def damaged(path: Path, number: int, what: str) -> UserError:
    """The error about a damaged line of a record file."""
    return UserError(f"{path}, line {number}: {what}; the file is damaged there: {REMEDY}")


def whole_lines(path: Path) -> tuple[list[str], str]:
    """(the complete lines of the file, each with its newline; the text after the last newline)."""
    data = path.read_bytes()
    try:
        text = data[: data.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise damaged(path, number, f"not UTF-8 (byte {error.start})") from error
    torn = data[data.rfind(b"\n") + 1 :].decode("utf-8", errors="replace")  # it may end within a character
    *lines, _ = text.split("\n")  # not splitlines(): text may hold U+2028 and its like
    return [line + "\n" for line in lines], torn
