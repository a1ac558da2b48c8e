"""Explains keys: one on the command line, or all of them as docs/config.md (`python -m rlinf.config.explain`)."""

from __future__ import annotations

import sys

from rlinf.config.keys import REQUIRED, Key, known_keys, known_sections
from rlinf.config.load import Resolved, value_of
from rlinf.config.settings import unknown
from rlinf.config.values import dump
from rlinf.errors import UserError

HEADER = """# Configuration keys

Written from `rlinf/config/schema.py` by `python -m rlinf.config.explain > docs/config.md`; a test keeps it up to date.

A YAML file is merged as: defaults below, then the file named by a top-level `extends:` (relative to the file, or the name of an example;
may chain), then the file, then `key=value` words of the command line. Lists and `cluster.component_placement` are replaced as a whole.
`${runner.seq_length}` and `${oc.env:HOME}` are interpolated. `rlinf config show CONFIG` prints the result with who set each value;
`rlinf config explain KEY` explains one key.
"""


def explain(resolved: Resolved | None, key: str) -> str:
    """Meaning, type, default and choices of a key, and with a configuration its value and who set it. A section lists its keys."""
    known = known_keys().get(key)
    if known:
        lines = [key, f"  meaning  {known.help}", f"  type     {known.type_name}", f"  default  {_default(known)}"]
        own = ", or path/to/file.py:function" if known.own else ""
        lines += [f"  choices  {', '.join(dump(c) for c in known.choices)}{own}"] if known.choices else []
        lines += [f"  value    {dump(value_of(resolved.config, key))}", f"  set by   {resolved.provenance[key]}"] if resolved else []
        return "\n".join(lines)
    if key not in known_sections():
        raise UserError(unknown(key))
    names = [n for n in known_keys() if n.startswith(key + ".")]
    return "\n".join([f"{key}: section with {len(names)} keys"] + [f"  {n:<46} {known_keys()[n].help}" for n in names])


def reference() -> str:
    """The text of docs/config.md."""
    lines = [HEADER]
    for section in known_sections():
        names = [n for n in known_keys() if n.rpartition(".")[0] == section]
        if names:
            lines += [f"\n## {section}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
            lines += [_row(known_keys()[n]) for n in names]
    return "\n".join(lines) + "\n"


def _default(key: Key) -> str:
    return "none: it must be set" if key.default == REQUIRED else dump(key.default)


def _row(key: Key) -> str:
    kind = " / ".join(f"`{dump(c)}`" for c in key.choices) if key.choices else key.type_name
    kind += " / [file.py:function](extending.md)" if key.choices and key.own else ""
    kind = kind.replace("<", "&lt;")
    default = _default(key) if key.default == REQUIRED else f"`{dump(key.default)}`"
    return f"| `{key.name.rpartition('.')[2]}` | {kind} | {default} | {key.help.replace('<', '&lt;')} |"


if __name__ == "__main__":
    sys.stdout.write(reference())
