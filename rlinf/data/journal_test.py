"""What is written of a group comes back, to the bit; a damaged line is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf.data.group_file_test import make, same
from rlinf.data.journal import group_line, read_groups
from rlinf.data.lines import append_lines
from rlinf.errors import UserError


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
    path.write_bytes(line.encode() + b"\n\0\xff\x80\n")
    with pytest.raises(UserError, match="groups_000004.jsonl:2"):
        list(read_groups(path))
