"""Reads what users wrote, YAML text and `key=value` words, into a list of settings with the file and line of each.

Problems (unknown keys, duplicates, wrong nesting) are appended to a list, so that the user sees all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from rlinf.config.dropped import dropped_key
from rlinf.config.keys import Key, known_keys, known_sections, nearest
from rlinf.errors import UserError

COMMAND_LINE = "command line"
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")  # in text; without a leading zero, since YAML 1.1 reads 010 as 8
INT = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)")
FLOAT = re.compile(r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Setting:
    """One key as the user wrote it. Its value may still have the wrong type, and may contain interpolations."""

    key: str
    value: Any
    where: str


class Loader(yaml.SafeLoader):
    """YAML 1.1, except that dates, 010 (otherwise 8) and 1:30 (otherwise 90) are text, and that `1e-5` is a number, as everybody
    expects."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(("timestamp", "float", "int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^({INT.pattern})$"), list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^({FLOAT.pattern})$"), list("-+.0123456789"))


def parse(text: str | bytes, where: str) -> yaml.Node:
    """The YAML node tree; an empty document is an empty mapping. Raises UserError with the line of a syntax error."""
    try:
        node = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        detail = " ".join(filter(None, (getattr(e, "context", None), getattr(e, "problem", None)))) or " ".join(str(e).split())
        raise UserError(f"{where}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {detail}") from e
    return node or yaml.MappingNode("tag:yaml.org,2002:map", [])


def read_section(node: yaml.Node, prefix: str, file: str, problems: list[str]) -> Iterator[Setting]:
    """The settings below a section (prefix "" or "actor.optim."). The top-level key `extends` is not a setting."""
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        return  # all its keys are commented out
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"{file}:{node.start_mark.line + 1}: {prefix[:-1]} is a section; expected keys below it, got {node.value!r}")
        return
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = prefix + str(key_node.value), key_node.start_mark.line + 1
        where = f"{file}:{line}"
        if name in first_line:
            problems.append(f"{where}: duplicate key {name}; it is already set in line {first_line[name]}")
            continue
        first_line[name] = line
        if name == "extends":
            continue
        if name in known_sections():
            yield from read_section(value_node, name + ".", file, problems)
        elif name in known_keys():
            yield Setting(name, _value(value_node, known_keys()[name], where, problems), where)
        else:
            problems.append(f"{where}: {unknown(name)}")


def read_override(word: str, problems: list[str]) -> Iterator[Setting]:
    """The setting in a `key=value` word of the command line; the value is YAML."""
    name, equals, text = word.partition("=")
    if not equals:
        problems.append(f"{COMMAND_LINE}: expected key=value, got {word!r}")
    elif name in known_keys():
        yield Setting(
            name, _value(parse(text or "null", f"{COMMAND_LINE}: {name}"), known_keys()[name], COMMAND_LINE, problems), COMMAND_LINE
        )
    elif name in known_sections():
        problems.append(
            f"{COMMAND_LINE}: {name} is a section; set one of its keys, such as {next(k for k in known_keys() if k.startswith(name + '.'))}"
        )
    else:
        problems.append(f"{COMMAND_LINE}: {unknown(name)}")


def unknown(name: str) -> str:
    """The message about a key that does not exist, with the one that the user may have meant."""
    replaced = dropped_key(name)
    if replaced:
        return f"{name} is not a key here: {replaced}"
    parent, _, part = name.rpartition(".")
    if parent in known_keys():
        if known_keys()[parent].kind is not dict:
            return f"{parent} is one value ({known_keys()[parent].type_name}) and has no {part}"
        return f"{parent} is one value; write it as a whole: '{parent}={{{part}: ...}}'"
    close = nearest(name)
    return f"unknown key {name}" + (
        f"; did you mean {close}?" if close else f"; the sections are {', '.join(s for s in known_sections() if '.' not in s)}"
    )


def python_value(node: yaml.Node) -> Any:
    return Loader("").construct_object(node, deep=True)


def read_texts(values: Mapping[str, str], key: str) -> dict[str, Any]:
    """A mapping of text to text, with each value read as in the configuration: `false` becomes False."""
    return {name: python_value(parse(value or "null", f"{key}: {name}")) for name, value in values.items()}


def _value(node: yaml.Node, key: Key, where: str, problems: list[str]) -> Any:
    """The value as Python. Where text is expected, a scalar stays as it is written (`0-7`, `007` and `off` are text)."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    items = [n for pair in pairs for n in pair] or (node.value if isinstance(node, yaml.SequenceNode) else [])
    if _tagged(node) or any(not isinstance(n, yaml.ScalarNode) or _tagged(n) for n in items):
        problems.append(f"{where}: {key.name}: expected {key.type_name}, got something nested or tagged")
        return key.default
    if isinstance(node, yaml.SequenceNode):
        return [n.value for n in items]
    if isinstance(node, yaml.MappingNode):
        names = [k.value for k, _ in pairs]
        problems += [f"{where}: {key.name}: duplicate key {n}" for n in dict.fromkeys(names) if names.count(n) > 1]
        return {k.value: v.value for k, v in pairs}
    return node.value if key.kind is str and not node.tag.endswith(":null") else python_value(node)


def _tagged(node: yaml.Node) -> bool:
    """Whether the type is written explicitly (`!!float 3`, `!mine x`)."""
    plain = getattr(node, "style", None) is None
    return node.tag != Loader("").resolve(type(node), node.value, (plain, not plain))
