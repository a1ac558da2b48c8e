"""Reads users' JSONL files (one JSON object a line), and writes files atomically.

A line that cannot be used is a Fault with file, line and reason.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rlinf.config.values import unique_keys
from rlinf.errors import UserError

SHOWN_LINES = 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write, which do not name the file
HALF_A_PAIR = "holds half a surrogate pair, which is no character"
MAGIC = {b"\x1f\x8b": "gzip-compressed", b"PAR1": "a Parquet file", b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd-compressed"}
TABLES = (".csv", ".tsv")
IMPORT = "; `rlinf data import` makes such a file"
Row = dict[str, Any]
R = TypeVar("R")


@dataclass(frozen=True)
class Fault:
    """A line that cannot be used, and why."""

    file: str
    line: int
    reason: str


class BadLine(Exception):
    """Raised by a parse function for a line that is not a record; becomes a Fault."""


def read_records(paths: Sequence[str], parse: Callable[[Row, Path, int], R], on_bad_record: str) -> tuple[list[R], list[Fault]]:
    """parse(row, file, line) of every line of all files, in order, and the faults of the lines that it refused or that are not JSON.

    Raises UserError when a file is missing, empty or not JSONL, and when lines are bad unless on_bad_record (data.on_bad_record) is `skip`.
    """
    parsed = [x for path in paths for x in read_file(Path(path).expanduser(), parse)]
    faults = [x for x in parsed if isinstance(x, Fault)]
    if faults and on_bad_record == "error":
        raise UserError(describe(faults, "cannot be used", "fix or remove them, or set data.on_bad_record: skip to go on without them"))
    return [x for x in parsed if not isinstance(x, Fault)], faults


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """Opens a scratch file, which is renamed to `path` when the block ends without an error, and removed otherwise; makes the folder.

    Links are followed. A pipe or a device is written directly: only files are ever replaced.
    Raises UserError when `path` cannot be written, before the block where that is known before.
    """
    place = Path(os.path.realpath(path))
    scratch = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.exists() and not path.is_file():
            with open(path, "w", encoding="utf-8") as file:
                yield file
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "w", encoding="utf-8") as file:
            yield file
        os.replace(scratch, place)
    except OSError as error:
        if not (error.errno in DISK_FULL or error.filename in map(str, (path, scratch, *path.parents, *place.parents))):
            raise  # an error of the block that is about something else
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file, or make room for this one") from error
    finally:
        if scratch.is_file():
            scratch.unlink()


def refuse_itself(source: Path, target: Path) -> None:
    """Raise UserError when source and target are the same file, so that the result would overwrite its input."""
    if source.exists() and target.exists() and source.samefile(target):
        raise UserError(f"{target}: is the file that is read, and would be lost; name another file for the result")


def write_splits(folder: Path, train: Iterable[Row], val: Iterable[Row]) -> dict[str, Path]:
    """Write train.jsonl and val.jsonl to `folder` and return their paths. Raises UserError, and writes neither, when one exists with other
    content."""
    texts = {name: "".join(json.dumps(record) + "\n" for record in records) for name, records in (("train", train), ("val", val))}
    files = {name: folder / f"{name}.jsonl" for name in texts}
    others = [str(f) for name, f in files.items() if f.is_file() and f.read_bytes() != texts[name].encode()]
    if others:
        raise UserError(
            f"{' and '.join(others)}: there already, with other content; nothing was written: name another folder, or remove it"
        )
    for name, file in files.items():
        with atomic_write(file) as out:
            out.write(texts[name])
    return files


def field(row: Row, name: str, key: str) -> Any:
    """The value of the field `name`. key: the configuration key that sets this name. Raises BadLine when there is no such field."""
    if name not in row:
        raise BadLine(f"no field `{name}` ({key}); the line has: {', '.join(row) or 'nothing'}")
    return row[name]


def describe(faults: Sequence[Fault], what: str, remedy: str, unit: str = "line") -> str:
    """A message with the first faults, one a line, between the heading "N data lines `what`" and the remedy. unit: what is counted."""
    shown = [f"  {fault.file}, {unit} {fault.line}: {fault.reason}" for fault in faults[:SHOWN_LINES]]
    if len(faults) > SHOWN_LINES:
        shown.append(f"  and {len(faults) - SHOWN_LINES} more")
    subject = f"1 data {unit}" if len(faults) == 1 else f"{len(faults)} data {unit}s"
    return "\n".join([f"{subject} {what}:", *shown, remedy])


def read_file(path: Path, parse: Callable[[Row, Path, int], R]) -> Iterator[R | Fault]:
    """Yields for every line parse(row, file, line), or the Fault of a line that it refused or that is not JSON.

    Raises UserError when the file is missing, empty or not JSONL.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such data file" if not path.exists() else f"{path}: not a file; give the JSONL files themselves")
    with open(path, "rb") as file:
        _check_start(path, file.read(4096))
        file.seek(0)
        empty = True
        for number, raw in enumerate(file, start=1):  # split at \n only: JSON strings may hold other line separators as they are
            if not raw.strip():
                continue
            empty = False
            try:
                yield parse(_row(raw.removeprefix(b"\xef\xbb\xbf")), path, number)
            except BadLine as bad:
                yield Fault(str(path), number, str(bad))
    if empty:
        raise UserError(f"{path}: the file is empty")


def _check_start(path: Path, start: bytes) -> None:
    """Raise UserError for a file that is not JSONL at all, with one message instead of one for each line."""
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {kind}; give it as plain JSONL (one JSON object a line){IMPORT if magic == b'PAR1' else ''}")
    if b"\0" in start:
        raise UserError(f"{path}: not a text file; give JSONL in UTF-8 (one JSON object a line)")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix.lower() in TABLES and text and not text.startswith((b"{", b"[")):
        what = f'{path.suffix[1:].upper()}, not JSONL; write one object a line, such as {{"prompt": "1+1=", "solutions": ["2"]}}'
        raise UserError(f"{path}: {what}{IMPORT if path.suffix.lower() == '.csv' else ''}")
    if text.startswith(b"["):
        raise UserError(f"{path}: a JSON array, not JSONL; write one object a line, for example with `jq -c '.[]'`{IMPORT}")


def _row(raw: bytes) -> Row:
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON ({error.msg}, column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits; a key twice
        raise BadLine(f"not readable ({error})") from error
    if not isinstance(row, dict):
        raise BadLine("not a JSON object")
    if b"\\ud" in raw.lower() and not is_unicode(row):
        raise BadLine(HALF_A_PAIR)
    return row


def is_unicode(row: Row) -> bool:
    """False when a string holds half a surrogate pair, which JSON can escape but no tokenizer accepts."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
