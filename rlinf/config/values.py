"""Values of keys: conversion to the type in the schema, choices, and printing as YAML."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

import yaml

from rlinf.config.dropped import dropped_value
from rlinf.config.keys import Key
from rlinf.config.own_code import is_own
from rlinf.config.settings import FLOAT, WHOLE, parse, python_value


def convert(value: Any, key: Key) -> Any:
    """The value in the type of the key. Raises ValueError that says what was expected."""
    if value is None and key.optional:
        return None
    if key.optional and key.kind is str and not key.choices and value in ("None", "none"):
        raise ValueError(f"expected {key.type_name}, got the word {value}; write null (or ./{value}, if it is a name)")
    converted = _integers(value) if key.kind is list and key.item is int else _as(key.kind, value)
    if converted is None:
        example = f"; write it in brackets: [{dump(value)}]" if key.kind is list and isinstance(value, (str, int, float)) else ""
        raise ValueError(f"expected {key.type_name}, got {dump(value)}{example}{_without_zeros(key, value)}")
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError(f"expected a finite number, got {value}")
    for item in converted if isinstance(converted, list) else [converted]:
        if key.choices and item not in key.choices and not (key.own and is_own(item)):
            own = ", or path/to/file.py:function" if key.own else ""
            raise ValueError(f"{dump(item)} is not one of {', '.join(dump(c) for c in key.choices)}{own}{_advice(key, item)}")
    return converted


def dump(value: Any) -> str:
    """yaml_line() of a resolved value: `${` in it is escaped, so that it is not taken for an interpolation."""
    return yaml_line(_escape(value))


def yaml_line(value: Any) -> str:
    """One YAML value on one line; text is quoted unless it is a plain word."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z./][\w./+-]*", value) and isinstance(python_value(parse(value, "")), str):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list) and all(type(v) is int for v in value):
        return str(value)
    if isinstance(value, (str, list, dict)):
        return yaml.safe_dump(value, default_style='"', default_flow_style=True, width=math.inf, allow_unicode=True).strip()
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def _without_zeros(key: Key, value: Any) -> str:
    """What to write instead of a number such as 010, which is 10 to some and 8 to others."""
    padded = key.kind in (int, float) and isinstance(value, str) and re.fullmatch(r"([-+]?)0+([0-9]+)", value)
    return f"; write {padded[1]}{padded[2]}: a leading zero makes an octal number to some" if padded else ""


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    if isinstance(value, list):
        return [_escape(v) for v in value]
    return {k: _escape(v) for k, v in value.items()} if isinstance(value, dict) else value


def _advice(key: Key, item: Any) -> str:
    replaced = dropped_value(key.name, item)
    close = difflib.get_close_matches(str(item), [str(c) for c in key.choices], n=1)
    return f"; {replaced}" if replaced else f"; did you mean {close[0]}?" if close else ""


def _integers(value: Any) -> list[int] | None:
    items: list[Any] = [_as(int, v) for v in value] if isinstance(value, list) else [None]
    return None if None in items else items


def _as(kind: type, value: Any) -> Any:
    """`value` converted to `kind`; None when it is something else. Text may hold a number, since interpolated environment variables are
    text."""
    number = type(value) in (int, float)
    text = value if isinstance(value, str) else ""
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}.get(text.lower())
    if kind is str:
        return value if isinstance(value, str) else str(value) if number else None
    if kind is float:
        return float(value) if number else float(text.replace("_", "")) if FLOAT.fullmatch(text) or WHOLE.fullmatch(text) else None
    if kind is int:
        whole = number and float(value).is_integer() or WHOLE.fullmatch(text)
        return int(value) if whole else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value if isinstance(value, kind) and all(isinstance(v, str) for v in items) else None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads(object_pairs_hook=...): raises ValueError for a key that occurs twice, of which JSON would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key `{next(name for name in names if names.count(name) > 1)}` is there twice")
    return found
