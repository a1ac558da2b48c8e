"""A field of the configuration: beside its default it has metadata `help` (meaning, with unit), `choices` and `own`."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(default: Any, help: str, choices: tuple[Any, ...] = (), own: bool = False) -> Any:
    """A field with its meaning; mutable defaults are copied. own: a function of the user's, `path/to/file.py:function`, may stand there."""
    meta = {"help": help, "choices": choices, "own": own}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)
