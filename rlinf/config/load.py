"""Loads a configuration: from a name or a path and `key=value` words to a typed Config, which knows who set every value.

The values are merged in this order: defaults of the schema, the file named by `extends:` (which may extend another), the file, the command
line. Lists and `cluster.component_placement` are replaced as a whole. Interpolations (`${runner.seq_length}`, `${oc.env:HOME}`) are
resolved by OmegaConf after the merge. All problems that are found are reported at once.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlinf.config.benchmarks import BENCHMARKS
from rlinf.config.keys import REQUIRED, known_keys
from rlinf.config.own_code import absolute
from rlinf.config.schema import Config
from rlinf.config.settings import COMMAND_LINE, Setting, parse, read_override, read_section
from rlinf.config.values import convert, dump
from rlinf.errors import UserError
from rlinf.hardware import fast_precision
from rlinf.run_paths import CONFIG_FILE

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "math" / "config"
ALIASES = {"grpo-1.5b-megatron": "qwen2.5-1.5b-grpo-megatron", "grpo-7b-megatron": "qwen2.5-7b-grpo-megatron"}
PATH_KEYS = (
    "runner.output_dir", "runner.resume_dir", "rollout.model_dir", "rollout.sglang_python", "critic.model_dir",
    "token_reward.model_dir",
    "data.train_data_paths", "data.val_data_paths",
    "evaluation.output_dir", "evaluation.opencompass_dir", *(f"evaluation.{name}.path" for name in BENCHMARKS),
)  # fmt: skip
DEFAULT = "default"


@dataclass(frozen=True)
class Resolved:
    """A loaded configuration. provenance: dotted key -> `file.yaml:12`, `command line` or `default`. source: the file."""

    config: Config
    provenance: dict[str, str]
    source: Path


def load(name_or_path: str | None, overrides: Sequence[str] = ()) -> Resolved:
    """Resolve a CONFIG (None: no file, only defaults and overrides).

    Raises UserError that lists every problem with the file and line, or the word, that it comes from.
    """
    source = find(name_or_path) if name_or_path is not None else Path(COMMAND_LINE)
    settings: list[Setting] = []
    problems: list[str] = []
    for path, root in _chain(source) if name_or_path is not None else ():
        settings += read_section(root, "", show(path), problems)
    for word in overrides:
        settings += read_override(word, problems)
    values: dict[str, Any] = {name: deepcopy(key.default) for name, key in known_keys().items()}
    provenance = dict.fromkeys(values, DEFAULT)
    for s in settings:
        values[s.key], provenance[s.key] = s.value, s.where
    resolved = _resolve(values, provenance, problems)
    for name in (n for n in resolved if n.endswith(".precision") and resolved[n] == "auto"):
        resolved[name], provenance[name] = (
            fast_precision(resolved.get("cluster.device", "auto")),
            f"{provenance[name]}: auto, by this machine",
        )
    if problems:
        raise UserError(f"{show(source)}: this configuration cannot be used:\n" + "\n".join("  " + p for p in problems))
    return Resolved(_build(Config, "", resolved), provenance, source)


def find(name_or_path: str) -> Path:
    """The YAML file of a CONFIG: an existing path, or the stem (or alias) of a file in examples/math/config."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        raise UserError(f"{name_or_path}: is {_what(path)}")
    if path.exists():
        return path  # a pipe: its name resolves to nothing
    if name_or_path.partition("=")[0] in known_keys():
        raise UserError(f"{name_or_path}: is a setting; CONFIG comes first, and then the settings: CONFIG {name_or_path}")
    example = EXAMPLES / (ALIASES.get(name_or_path, name_or_path) + ".yaml")
    if example.is_file():
        return example
    names = sorted(p.stem for p in EXAMPLES.glob("*.yaml"))
    close = difflib.get_close_matches(path.name.removesuffix(".yaml"), [*names, *ALIASES], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"{name_or_path}: no such configuration{hint}\n  give the path of a YAML file, or one of: {', '.join(names)}")


def _what(folder: Path) -> str:
    """What a folder is that was given as a configuration, and for which command it is meant."""
    if (folder / "config.json").is_file():
        return f"a model folder, no configuration; give a YAML file, with rollout.model_dir={folder}, or score it: rlinf eval {folder}"
    if (folder / CONFIG_FILE).is_file():
        return (
            f"the folder of a run, which rlinf report, watch and replay take; its configuration is {folder / CONFIG_FILE}, "
            "and runner.resume_dir=auto goes on with it"
        )
    return "a folder, no configuration; give a YAML file in it"


def show(path: Path) -> str:
    """A path as messages print it: relative to this checkout when it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def value_of(config: Config, name: str) -> Any:
    """config.a.b for "a.b"."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def to_yaml(resolved: Resolved) -> str:
    """The whole configuration as YAML that `load` reads again, each line with who set it as a comment."""
    lines: list[str] = []
    opened: list[str] = []
    for name in known_keys():
        *sections, leaf = name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(sections, opened)) if a != b), min(len(sections), len(opened)))
        lines += ["  " * depth + sections[depth] + ":" for depth in range(shared, len(sections))]
        opened = sections
        text = "  " * len(sections) + f"{leaf}: {dump(value_of(resolved.config, name))}"
        lines.append(f"{text:<60} # {resolved.provenance[name]}")
    return "\n".join(lines) + "\n"


def _chain(source: Path) -> list[tuple[Path, yaml.Node]]:
    """The file and the files that it extends, the farthest ancestor first."""
    chain: list[tuple[Path, yaml.Node]] = []
    path: Path | None = source
    while path:
        root = parse(path.read_bytes(), show(path))
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{show(path)}: expected sections such as `runner:` and `data:` at the top level")
        chain.insert(0, (path, root))
        extends = [(k, v) for k, v in root.value if k.value == "extends"]
        if not extends:
            return chain
        where = f"{show(path)}:{extends[0][0].start_mark.line + 1}"
        if not isinstance(extends[0][1], yaml.ScalarNode):
            raise UserError(f"{where}: extends: names one file, not several; let that one extend the next")
        path = _extended(path.parent, str(extends[0][1].value), where)
        if path in (p for p, _ in chain):
            raise UserError(f"{where}: extends: {show(path)} extends this file in turn; break the cycle")
    return chain


def _extended(folder: Path, name: str, where: str) -> Path:
    """The file that `extends:` names: beside the file that extends it, or else among the examples, so that a copy of an example may lie
    anywhere."""
    path = (folder / Path(name).expanduser()).resolve()
    if path.is_file():
        return path
    stem = Path(name).name.removesuffix(".yaml")
    example = EXAMPLES / f"{ALIASES.get(stem, stem)}.yaml"
    if example.is_file() and Path(name).name == name:
        return example.resolve()
    names = ", ".join(sorted(p.stem for p in EXAMPLES.glob("*.yaml")))
    raise UserError(
        f"{where}: extends: {show(path)} does not exist; the path is relative to the file that names it, or the name of one of: {names}"
    )


def _resolve(values: Mapping[str, Any], provenance: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """Resolve interpolations and convert every value."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    config, result = OmegaConf.create(tree), {}
    for name, key in known_keys().items():
        if values[name] == REQUIRED:
            problems.append(f"{name} is not set; it is the {key.help}")
            continue
        try:
            value = OmegaConf.select(config, name)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            value = convert(value, key)
            result[name] = _expand(value) if name in PATH_KEYS else absolute(value) if key.own else value
        except OmegaConfBaseException as e:
            problems.append(f"{provenance[name]}: {name}: cannot resolve {values[name]}: {str(e).splitlines()[0]}{_of_environment(e)}")
        except ValueError as e:
            problems.append(f"{provenance[name]}: {name}: {e}")
    return result


def _of_environment(error: OmegaConfBaseException) -> str:
    """What to write instead of `${HOME}`, which OmegaConf reads as a key."""
    name = re.match(r"Interpolation key '([A-Z][A-Z0-9_]*)' not found", str(error))
    return f"; the variable of the environment is ${{oc.env:{name[1]}}}" if name else ""


def _expand(path: Any) -> Any:
    """Replace `~` at the start of a path, or of each of a list of paths, by the home folder."""
    if isinstance(path, list):
        return [_expand(p) for p in path]
    return str(Path(path).expanduser()) if path and path.startswith("~") else path


def _build(section: type, prefix: str, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(section)
    return section(**{
        f.name: _build(hints[f.name], f"{prefix}{f.name}.", values) if is_dataclass(hints[f.name]) else values[prefix + f.name]
        for f in fields(section)
    })  # fmt: skip
