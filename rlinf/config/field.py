"""How fields of the configuration are declared: besides its default a field has metadata `help` (meaning, with unit), `choices` and
`own`."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(default: Any, help: str, choices: tuple[Any, ...] = (), own: bool = False) -> Any:
    """A field with its meaning. Mutable defaults are copied. own: whether the value may name a function of the user's own,
    `path/to/file.py:function`."""
    meta = {"help": help, "choices": choices, "own": own}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)
