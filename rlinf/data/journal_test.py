"""What is written of a group comes back, to the bit; a damaged line is refused by name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from rlinf.data.journal import group_line, journal_of, read_groups
from rlinf.data.lines import append_lines
from rlinf.data.records import Finish, Group, Prompt, Sample, Status, Verdict
from rlinf.errors import UserError


def make(verdicts: bool = True) -> Group:
    prompt = Prompt("p/1", np.arange(3, dtype=np.int32), "math", ("1", "\\frac{1}{2}"), "What is\u2028 1?", {"level": 3})
    logprobs = np.array([-0.1, np.nan], np.float32)
    first = Sample("4.p/1/0", np.array([7, 151643], np.int32), logprobs, np.array([1, 0], np.uint8), ((3, 1), (4, 1)), Finish.STOP, (2,), 1)
    empty = Sample("4.p/1/1", np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.uint8), (), Finish.ABORT, parent="3.p/1/1")
    judged = (Verdict(5.0, Status.RIGHT, "1", "exact", 0.25, "same", (("format", 0.5),)), None)
    return Group("4.p/1", prompt, (first, empty), judged if verdicts else ())


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, tuple):
        return type(b) is tuple and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


def test_groups_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "groups_000004.jsonl"
    for group in (make(), make(verdicts=False)):
        append_lines(path, [group_line(group)])
    first, second = read_groups(path)
    assert same(first, make()) and same(second, make(verdicts=False)) and not same(first, second)
    assert first.header() == make().header()


def test_a_torn_last_line_is_left_out_and_a_damaged_one_named(tmp_path: Path) -> None:
    path, line = tmp_path / "groups_000004.jsonl", group_line(make())
    path.write_text(line + "\n" + line[: len(line) // 2])
    assert len(list(read_groups(path))) == 1
    path.write_text(line + "\n" + line.replace('"finish": "stop"', '"finish": "odd"') + "\n")
    with pytest.raises(UserError, match="groups_000004.jsonl:2"):
        list(read_groups(path))


def test_only_steps_are_journalled() -> None:
    assert journal_of(Path("a/samples/step_000012.jsonl")) == Path("a/samples/groups_000012.jsonl")
    assert journal_of(Path("a/samples/validation_000012.jsonl")) is None
