"""A record file is read as far as it is whole; what is wrong with a line is said by file, line and field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlinf.errors import UserError
from rlinf.record_files import NUMBER, NUMBERS, OBJECT, PAIRS, TEXT, TEXTS, WHOLE, Kind, misfit, or_null, whole_lines, whole_rows


def test_a_last_line_that_is_torn_within_a_character_is_only_torn(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"a": "é\u2028"}\n{"a": "é'.encode()[:-1])
    assert whole_rows(file) == [{"a": "é\u2028"}] and whole_lines(file) == (['{"a": "é\u2028"}\n'], '{"a": "\ufffd')
    file.write_bytes(b"")
    assert whole_rows(file) == [] and whole_lines(file) == ([], "")


def test_a_field_that_is_missing_or_another_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for line, said in (('{"b": 1}', "no field `a`"), ('{"a": 1}', "`a` is 1, not a string"), ("[]", "not a JSON object")):
        file.write_text(f'{{"a": "x"}}\n{line}\n')
        with pytest.raises(UserError, match=f"^{file}, line 2: {said}; the file is damaged there: take that line out"):
            whole_rows(file, {"a": TEXT})


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (TEXT, [""], [1, None]),
        (NUMBER, [1, -0.5, float("nan")], [True, "1", 10**400]),
        (WHOLE, [0, sys.maxsize], [-1, 1.0, True, sys.maxsize + 1]),
        (OBJECT, [{}], [[]]),
        (NUMBERS, [{}, {"a": 1}], [{"a": "1"}, [1]]),
        (TEXTS, [[], ["a"]], [["a", 1], "a"]),
        (PAIRS, [[], [[1, 2]]], [[[1]], [[1, 2.0]], [1, 2]]),
        (or_null(TEXT), [None, "a"], [1]),
    ],
)
def test_what_a_field_is_to_hold(kind: Kind, right: list[Any], wrong: list[Any]) -> None:
    assert not any(misfit({"a": value}, {"a": kind}) for value in right)
    assert all(misfit({"a": value}, {"a": kind}).endswith(f"not {kind.name}") for value in wrong)


def test_reading_records_loads_nothing_that_writes_them() -> None:
    code = (
        "import sys, rlinf.record_files, rlinf.run_paths; print([m for m in sys.modules if m in ('tensorboard', 'rlinf.metrics.logger')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
