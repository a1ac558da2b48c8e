"""The schema as a flat table: dotted key -> type, default, meaning, choices. Used for loading, explaining and docs/config.md."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from rlinf.config.schema import Config

REQUIRED = "???"  # OmegaConf's mark of a key without a default


@dataclass(frozen=True)
class Key:
    """One leaf of the configuration.

    kind: one of str, int, float, bool, list, dict. optional: whether it may be null. own and the bounds: see field.key. item: the type of
    the elements of a list.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[Any, ...]
    own: bool
    at_least: float | None
    at_most: float | None
    more_than: float | None
    less_than: float | None
    item: type = str

    @property
    def type_name(self) -> str:
        names = {
            str: "text",
            int: "integer",
            float: "number",
            bool: "true or false",
            list: "list of integers" if self.item is int else "list of text",
            dict: "mapping of text to text",
        }
        signs = {"≥": self.at_least, ">": self.more_than, "≤": self.at_most, "<": self.less_than}
        bounds = ", ".join(f"{sign} {bound}" for sign, bound in signs.items() if bound is not None)
        return f"{names[self.kind]} {bounds}".strip() + (" or null" if self.optional else "")

    def out_of_bounds(self, value: float) -> str | None:
        """What is wrong with a number, by its bounds."""
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most}"
        if self.more_than is not None and value <= self.more_than:
            return f"must be greater than {self.more_than}"
        if self.less_than is not None and value >= self.less_than:
            return f"must be less than {self.less_than}"
        return None


@cache
def known_keys() -> dict[str, Key]:
    """Every leaf, in the order of the schema."""
    return {k.name: k for k in _walk(Config, "")}


@cache
def known_sections() -> tuple[str, ...]:
    """Every dotted prefix of a leaf: `actor`, `actor.optim`, ..."""
    return tuple(dict.fromkeys(name.rsplit(".", depth)[0] for name in known_keys() for depth in range(name.count("."), 0, -1)))


def nearest(name: str) -> str | None:
    """The key or section that the user most likely meant: one with the same last word in another section, or else the one with the most
    similar spelling."""
    candidates = [*known_keys(), *known_sections()]
    same_leaf = [c for c in candidates if c.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    found = difflib.get_close_matches(name, same_leaf, n=1, cutoff=0.0) or difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return found[0] if found else None


def _walk(section: type, prefix: str) -> list[Key]:
    hints = typing.get_type_hints(section)
    keys = []
    for field in fields(section):
        name, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            keys += _walk(typing.cast(type, hint), name + ".")
            continue
        optional = isinstance(hint, types.UnionType)
        if optional:
            hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        item = next(iter(typing.get_args(hint)), str)
        keys.append(Key(name, typing.get_origin(hint) or hint, optional, default, item=item, **field.metadata))
    return keys
