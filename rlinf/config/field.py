"""How fields of the configuration are declared: besides its default a field has metadata `help` (meaning, with unit), `choices`, `own` and
the bounds of a number."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any,
    help: str,
    choices: tuple[Any, ...] = (),
    own: bool = False,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    more_than: float | None = None,
    less_than: float | None = None,
) -> Any:
    """A field with its meaning. Mutable defaults are copied. own: whether the value may name a function of the user's own,
    `path/to/file.py:function`. The bounds are those of the number alone; what concerns several keys is in validate.py."""
    bounds = {"at_least": at_least, "at_most": at_most, "more_than": more_than, "less_than": less_than}
    meta = {"help": help, "choices": choices, "own": own} | bounds
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)
