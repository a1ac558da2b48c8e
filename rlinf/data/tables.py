"""Reads files of rows of others: JSONL, JSON, CSV and Parquet."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlinf.config.values import unique_keys
from rlinf.errors import UserError

LONGEST_FIELD = 1 << 30  # characters of a CSV field; the default of 128 Ki is less than some worked solutions or contexts have


def read_rows(path: Path) -> list[Any]:
    """Rows of a .jsonl, .json (a list), .csv or .parquet file."""
    if not path.is_file():
        raise UserError(f"{path}: is a folder; give the file in it" if path.is_dir() else f"{path}: no such file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows: list[Any] = _read_csv(path, file)
            elif path.suffix == ".json":
                rows = json.load(file, object_pairs_hook=unique_keys)
            elif path.suffix == ".jsonl":
                rows = _read_lines(path, file.read())
            else:
                raise UserError(f"{path}: give a .jsonl, .json, .csv or .parquet file")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); fetch the file again, or mend it") from error
    except (ValueError, RecursionError, csv.Error) as error:  # no text; nested too deeply; a number of thousands of digits; a key twice
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} text ({error}); fetch the file again, or mend it") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: holds no list of problems")
    return rows


def _read_csv(path: Path, file: Iterable[str]) -> list[Any]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(file)
    names = [name for name in reader.fieldnames or () if name]  # columns without a name cannot be asked for
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: has two columns `{name}`, and only the last would be read; rename one")
    return list(reader)


def _read_lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line, object_pairs_hook=unique_keys))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); fetch the file again, or mend it") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply; a key twice
            raise UserError(f"{path}, line {number}: not readable ({error}); fetch the file again, or mend it") from error
    return rows


def _read_parquet(path: Path) -> list[Any]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or give the .jsonl or .csv form of the file")
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); fetch the file again, or mend it") from error
