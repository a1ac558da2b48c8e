"""Data sets of others become training files; rows that cannot be used are named, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlinf.config.schema import DataConfig
from rlinf.data.foreign import import_file
from rlinf.data.jsonl import read_records
from rlinf.data.prompts import parse_prompt
from rlinf.errors import UserError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
VERL = {"prompt": CHAT, "reward_model": {"ground_truth": "2", "style": "rule"}, "extra_info": {"split": "train", "index": 7}}


def imported(source: Path, *fields: str, **how: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    out = source.with_name("out.jsonl")
    report = import_file(source, out, *fields, **how)
    return [json.loads(line) for line in out.read_text().splitlines()], report


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_gets_the_instruction_and_answers_become_a_list_of_texts(tmp_path: Path) -> None:
    rows = [{"q": "1+1?", "a": "2"}, {"q": "2+2?", "a": 4}, {"q": "1/2?", "a": ["1/2", 0.5]}]
    records, report = imported(lines(tmp_path / "set.jsonl", *rows), "q", "a", instruction="Box it.")
    assert [r["prompt"] for r in records] == ["1+1?\nBox it.", "2+2?\nBox it.", "1/2?\nBox it."]
    assert [r["solutions"] for r in records] == [["2"], ["4"], ["1/2", "0.5"]]
    assert [r["query_id"] for r in records] == ["set-1", "set-2", "set-3"] and {r["task"] for r in records} == {"math"}
    assert report["problems"] == 3 and "warning" not in report and "left_out" not in report


def test_records_of_verl_are_read_through_dots_and_stay_conversations(tmp_path: Path) -> None:
    how = {"name": "extra_info.index", "metadata": "extra_info", "instruction": "Box it."}
    records, report = imported(lines(tmp_path / "verl.jsonl", VERL), "prompt", "reward_model.ground_truth", **how)
    assert records == [{"prompt": CHAT, "task": "math", "query_id": 7, "solutions": ["2"], "metadata": VERL["extra_info"]}]
    assert report["warning"].startswith("1 prompts are conversations, and stay as they are")


def test_an_answer_may_stand_behind_a_mark(tmp_path: Path) -> None:
    source = lines(tmp_path / "gsm.jsonl", {"q": "1+1?", "a": "1 #### no\n#### 2,125 \n"}, {"q": "2+2?", "a": "4"})
    records, report = imported(source, "q", "a", after="####", skip_bad=True)
    assert [r["solutions"] for r in records] == [["2,125"]] and "row 2: `a` has no '####'" in report["left_out"]


def test_a_field_whose_own_name_has_a_dot_goes_first(tmp_path: Path) -> None:
    source = tmp_path / "set.csv"
    source.write_text("q.en,a\n1+1?,2\n")
    assert imported(source, "q.en", "a")[0][0]["prompt"] == "1+1?"


def test_a_run_reads_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    import_file(lines(tmp_path / "verl.jsonl", VERL, VERL | {"prompt": "2-1?"}), out, "prompt", "reward_model.ground_truth", task="choice")
    records, faults = read_records([str(out)], lambda *row: parse_prompt(*row, data=DataConfig(apply_chat_template=True)), "error")
    assert not faults and [r.prompt for r in records] == [tuple(CHAT), ({"role": "user", "content": "2-1?"},)]
    assert {r.task for r in records} == {"choice"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "1+1?"}, "no field `a`; the row has: q"),
        ({"q": "1+1?", "a": None}, "`a` is None"),
        ({"q": "1+1?", "a": True}, "`a` is True"),
        ({"q": "1+1?", "a": float("nan")}, "`a` is nan"),
        ({"q": "1+1?", "a": {"value": "2"}}, "`a` is {'value': '2'}; it must be a text"),
        ({"q": "1+1?", "a": []}, "an empty list"),
        ({"q": "1+1?", "a": "  "}, "an empty string"),
        ({"q": " ", "a": "2"}, "`prompt` is empty"),
        ({"q": [{"role": "user"}], "a": "2"}, "must hold chat messages"),
        ({"q": "\ud800", "a": "2"}, "surrogate"),
        ([1], "not an object with fields"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_and_nothing_is_written(tmp_path: Path, row: Any, message: str) -> None:
    source = lines(tmp_path / "set.jsonl", {"q": "1+1?", "a": "2"}, row)
    with pytest.raises(UserError) as error:
        import_file(source, tmp_path / "out.jsonl", "q", "a", instruction="Box it.")
    assert message in str(error.value) and f"{source}, row 2: " in str(error.value) and "--skip-bad" in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()
    records, report = imported(source, "q", "a", instruction="Box it.", skip_bad=True)
    assert len(records) == report["problems"] == 1 and "row 2: " in report["left_out"]


def test_a_name_that_no_row_has_is_refused_whatever_may_be_skipped(tmp_path: Path) -> None:
    source = lines(tmp_path / "set.jsonl", {"question": "1+1?", "a": "2"})
    with pytest.raises(UserError, match="no field `q`; the row has: question, a") as error:
        import_file(source, tmp_path / "out.jsonl", "q", "a", skip_bad=True)
    assert "--skip-bad" not in str(error.value) and not (tmp_path / "out.jsonl").exists()


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    source = lines(tmp_path / "set.jsonl", {"q": "1+1?", "a": "2", "m": float("inf")})
    with pytest.raises(UserError, match="cannot be written as JSON"):
        import_file(source, tmp_path / "out.jsonl", "q", "a", metadata="m")


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    source = lines(tmp_path / "set.jsonl", {"q": "1+1?", "a": "2"})
    with pytest.raises(UserError, match="would be lost"):
        import_file(source, source, "q", "a")


def test_a_field_of_a_csv_file_may_be_long(tmp_path: Path) -> None:
    source = tmp_path / "long.csv"
    source.write_text(f"q,a,solution\n1+1?,2,{'x' * 200_000}\n")
    assert imported(source, "q", "a")[0][0]["solutions"] == ["2"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("two.csv", "q,a,a\n1+1?,2,3\n", "two columns `a`"),
        ("two.jsonl", '{"q": "1+1?", "a": "2", "a": "3"}\n', "line 1: not readable .the key `a` is there twice"),
        ("two.json", '[{"q": "1+1?", "a": "2", "a": "3"}]', "the key `a` is there twice"),
    ],
)
def test_a_field_that_is_there_twice_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    """Which of the two is the answer cannot be known."""
    (source := tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        imported(source, "q", "a")


def test_columns_without_a_name_do_no_harm(tmp_path: Path) -> None:
    (source := tmp_path / "sheet.csv").write_text("q,a,,\n1+1?,2,,\n")
    assert imported(source, "q", "a")[0][0]["solutions"] == ["2"]
