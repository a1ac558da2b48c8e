"""Small files: written so that nobody sees half of one, or so that they outlast a power cut, and read with one clear message."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlinf.errors import UserError


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_through(path: Path, text: str | Iterable[str], errors: str = "strict") -> None:
    """Write the file, in UTF-8, and fsync it. text: may come in parts. errors: as of open()."""
    with path.open("w", encoding="utf-8", errors=errors) as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str | Iterable[str], errors: str = "strict") -> None:
    """Replace the content of the file: a reader, and whoever comes after a power cut, finds the old content or the new. For one
    writer at a time. text, errors: as of write_through()."""
    scratch = scratch_of(path)
    write_through(scratch, text, errors)
    scratch.replace(path)
    sync(path.parent)


def write_visible(path: Path, text: str) -> None:
    """As write_whole(), for what is soon out of date: it does not wait for the disk, so a power cut may leave an empty file."""
    scratch = scratch_of(path)
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def scratch_of(path: Path) -> Path:
    """Where the file's next content is until it is complete."""
    return path.with_name(f".{path.name}.new")


def as_json(content: object) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=1) + "\n"


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, and fsync it."""
    write_through(path, as_json(content))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UserError:
    """The error about a file that could not be read because of `error`."""
    if isinstance(error, PermissionError) or (path.exists() and not os.access(path, os.R_OK)):  # safetensors calls that missing
        return UserError(f"{path}: permission denied; let this user read it")
    return UserError(f"{path}: cannot be read ({error}); the file is missing or damaged")
