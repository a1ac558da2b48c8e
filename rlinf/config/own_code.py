"""Loads a user's own function, which the configuration names as `path/to/file.py:function` in place of one of our names."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from traceback import extract_tb
from typing import Any

from rlinf.errors import UserError

MARK = ".py:"
ARGUMENTS: dict[str, tuple[str, ...]] = {  # key -> what its function is called with; docs/extending.md describes them
    "reward.own_tasks": ("answer, solutions",),
    "reward.own_parts": ("response",),
    "reward.own_group_parts": ("responses",),
    "algorithm.loss_type": ("logprobs_N, old_logprobs_N, advantages_N, sample_N, n_samples, clip",),
    "algorithm.adv_type": ("rewards_G", "rewards_G, tokens_G"),
}


def is_own(value: Any) -> bool:
    return isinstance(value, str) and MARK in value


def absolute(value: Any) -> Any:
    """The name of an own function with the absolute path of its file, because workers run in other folders and on other nodes. Other names
    are returned unchanged."""
    if isinstance(value, dict):
        return {name: absolute(v) for name, v in value.items()}
    if not is_own(value):
        return value
    path, _, function = value.rpartition(":")
    return f"{Path(path).expanduser().resolve()}:{function}"


def file_of(reference: str) -> Path:
    return Path(reference.rpartition(":")[0])


def present(reference: str) -> Path:
    """The function's file. Raises UserError when there is none."""
    if not (file := file_of(reference)).is_file():
        raise UserError(f"{reference}: there is no file {file}; on a cluster it must be at the same path on every node")
    return file


def checksum_of(reference: str) -> str:
    """sha256 of the function's file. Raises UserError when there is none."""
    return hashlib.sha256(present(reference).read_bytes()).hexdigest()


def identified(functions: Mapping[str, str]) -> dict[str, str]:
    """Own functions by the name that each serves: the function's name and the sha256 of its file, wherever that lies."""
    return {name: f"{function.rpartition(':')[2]} {checksum_of(function)}" for name, function in functions.items()}


@cache
def load_own(reference: str) -> Callable[..., Any]:
    """The function. Its file is executed once in each process. Raises UserError when there is no such function."""
    file, name = present(reference), reference.rpartition(":")[2]
    module_name = f"rlinf_own_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{reference}: {error.filename or file}, line {error.lineno}: {error.msg}; fix the file") from error
    except ImportError as error:
        line = next(frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(file))
        raise UserError(f"{reference}: {file}, line {line}: {error}; install it (on a cluster on every node), or fix the import") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{reference}: {file} has no function {name}")
    return function


def own_function(value: Any) -> Callable[..., Any] | None:
    """The function that the value of a key names; None when the value is one of our names."""
    return load_own(value) if is_own(value) else None


def check_own(key: str, reference: str) -> None:
    """Load the function that `key` names, and compare its parameters with what it will be called with; it is not run.

    Raises UserError when there is no such function, or when it cannot be called so.
    """
    try:
        signature = inspect.signature(load_own(reference))
    except ValueError:  # written in C: it does not say what it takes
        return
    problems = [_misfit(signature, given) for given in ARGUMENTS[key]]
    if all(problems):
        name, given = reference.rpartition(":")[2], " or ".join(f"({given})" for given in ARGUMENTS[key])
        raise UserError(f"{key}: {reference} takes {signature}, but is called as {name}{given}: {problems[0]}; change its parameters")


def _misfit(signature: inspect.Signature, given: str) -> str:
    """Why a function cannot be called with these positional arguments; empty when it can."""
    try:
        signature.bind(*given.split(", "))
    except TypeError as error:
        return str(error)
    return ""
