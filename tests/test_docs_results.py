"""docs/results.md: our figures are those of the files, and every published row has its command and its gate."""

from __future__ import annotations

import re

from benchmarks.tables import PAGE, PLACE, TABLES, filled

TEXT = PAGE.read_text()
ROW = re.compile(r"^\| (\d) \| (\S+) \| (\d\d\.\d\d) \| (\d\d\.\d\d) \| (\d\d\.\d\d) \|$", re.MULTILINE)
GATE = re.compile(r"^\| (\d) \| (\S+) \| (\d+) to (\d+) \| (\d+) to (\d+) \| (\d+) to (\d+) \|$", re.MULTILINE)
SAME = {"AReaL-1.5B": "AReaL-boba-RL-1.5B", "AReaL-7B": "AReaL-boba-RL-7B"}  # the name of the checkpoint


def test_the_tables_are_those_of_the_files() -> None:
    assert [place[1] for place in PLACE.findall(TEXT)] == list(TABLES)
    assert filled(TEXT) == TEXT, "run python benchmarks/tables.py"


def test_another_figure_in_the_page_would_be_seen() -> None:
    (number,) = set(re.findall(r"\d\d\.\d %", PLACE.search(TEXT)[0])[:1])  # type: ignore[index]
    assert filled(TEXT.replace(number, "12.3 %", 1)) == TEXT


def test_every_published_row_has_a_command_and_a_gate() -> None:
    rows = ROW.findall(TEXT)
    assert [row[0] for row in rows] == list("123456")
    commands = dict(reversed(c) for c in re.findall(r"^bash toolkits/eval/run.sh /data /models/(\S+) .*# row (\d)$", TEXT, re.MULTILINE))
    assert commands == {number: SAME.get(model, model) for number, model, *_ in rows}
    gates = GATE.findall(TEXT)
    assert [g[0] for g in gates] == ["1", "4"]
    for number, model, *bounds in gates:
        (published,) = [row[2:] for row in rows if row[:2] == (number, model)]
        assert all(int(low) < float(score) < int(high) for score, low, high in zip(published, bounds[::2], bounds[1::2]))
