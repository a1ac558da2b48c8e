"""What `rlinf data check` finds, and that it finds nothing in a good file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlinf import cli
from rlinf.checks.data_check import check, main, near_misses
from rlinf.config.schema import DataConfig
from rlinf.data.jsonl import read_records
from rlinf.data.prompts import parse_prompt
from rlinf.errors import UserError
from rlinf.rewards.math.decide_test import labelled_pairs, status


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def record(k: int, gold: str, prompt: str = "", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt or f"Question {k}?", "task": "math", "query_id": str(k), "solutions": [f"\\boxed{{{gold}}}"]} | more


def test_a_good_file_is_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golds = sorted({g for pairs in labelled_pairs().values() for g, _, right in pairs if right})
    path = write(tmp_path / "good.jsonl", *(record(k, gold) for k, gold in enumerate(golds)))
    report = check(path)
    assert report["faults"] == {} and report["remarks"] == {}
    assert report["records"] == len(golds) and report["tasks"] == {"math": len(golds)}
    assert sum(report["gold_kinds"].values()) == len(golds)
    assert main(write(tmp_path / "one.jsonl", record(0, "5"))) == 0
    assert capsys.readouterr().out.endswith("fit to train on\n")


def test_every_kind_of_finding_is_found_and_named_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "bad.jsonl",
        record(1, "5"),
        "not json",
        record(3, "\\frac{1}{}"),
        record(4, "7", task="code"),
        record(5, "5", prompt="Question 1?"),
        record(6, "6", prompt="Question 1?"),
        record(7, "8", query_id="1"),
        record(8, "9", prompt="It is \\boxed{9}, is it not?"),
        record(9, "x", solutions=[]),
        record(10, "7", task="choice"),
    )
    assert main(path, as_json=True) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] == {"bad_line": 2, "unknown_task": 1, "gold_unreadable": 2, "gold_not_right": 1}
    assert report["remarks"] == {"duplicate_prompt": 1, "conflicting_golds": 1, "duplicate_id": 1, "leaked_answer": 1}
    lines = {kind: [f["line"] for f in found] for kind, found in report["lines"].items()}
    assert (
        lines["bad_line"] == [2, 9]
        and lines["gold_unreadable"] == [3, 10]
        and lines["duplicate_prompt"] == [5]
        and lines["leaked_answer"] == [8]
    )
    main(path)
    assert "fix the faults first" in capsys.readouterr().out


def test_tasks_of_ones_own_are_judged_as_the_configuration_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("def same_length(answer, solutions):\n    return len(answer) == len(solutions[0])\n")
    config = tmp_path / "run.yaml"
    config.write_text(f"reward:\n  own_tasks: {{lengths: '{tmp_path}/own.py:same_length'}}\n")
    data = write(tmp_path / "data.jsonl", record(1, "5"), record(2, "7", task="lengths", solutions=["xyz"]))
    assert cli.main(["data", "check", str(data), "--config", str(config)]) == 0
    assert "lengths 1" in capsys.readouterr().out
    assert cli.main(["data", "check", str(data)]) == 2 and "1 x unknown_task" in capsys.readouterr().out
    answers = write(
        tmp_path / "in.jsonl", *({"response": f"\\boxed{{{a}}}", "solutions": ["xyz"], "task": "lengths"} for a in ("abc", "ab"))
    )
    out = tmp_path / "out.jsonl"
    assert cli.main(["verify", str(answers), str(out), "--config", str(config)]) == 0
    assert [json.loads(line)["status"] for line in out.open()] == ["right", "wrong"]
    assert cli.main(["verify", str(answers), str(out)]) == 2 and "task 'lengths': no verifier" in capsys.readouterr().err
    config.write_text(f"reward:\n  own_tasks: {{lengths: '{tmp_path}/own.py:none'}}\n")
    assert cli.main(["data", "check", str(data), "--config", str(config)]) == 2 and "has no function none" in capsys.readouterr().err


def test_near_misses_are_wrong() -> None:
    for gold in ("0", "5", "\\frac{1}{3}", "2\\sqrt{3}", "x^2+1", "\\{1,2\\}", "(1,2)", "[0,1)", "x>3", "\\text{east}", "3:30 \\text{ pm}"):
        misses = near_misses(gold)
        assert misses and all(status(gold, miss) != "right" for miss in misses), gold


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data file"):
        check(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a\xff?", "solutions": ["5"]}', "not UTF-8 (byte 13)"),
        (b'{"prompt": "a\\ud800?", "solutions": ["5"]}', "half a surrogate pair"),
        (b'{"prompt": "a?", "solutions": ["5"], "query_id": [1]}', "`query_id` is neither"),
        (b'{"prompt": "a?", "solutions": ["5"], "n": ' + b"9" * 5000 + b"}", "not readable"),
        (b'{"prompt": ["a?"], "solutions": ["5"]}', "data.apply_chat_template: true"),
        (b'\xef\xbb\xbf{"prompt": "a?", "solutions": ["5"]}', ""),
        (b'{"prompt": "a?", "solutions": "5", "task": null}', ""),
    ],
)
def test_a_line_is_bad_when_a_run_would_refuse_it(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(line + b"\n")
    report = check(path)
    _, refused = read_records([str(path)], partial(parse_prompt, data=DataConfig()), "skip")
    assert report["lines"].get("bad_line", []) == [{"line": f.line, "text": f.reason} for f in refused]
    assert [reason in f.reason for f in refused] == [True] * bool(reason) and report["records"] == (not reason)


def test_an_empty_file_is_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text("\n\n")
    assert cli.main(["data", "check", str(tmp_path / "data.jsonl")]) == 2
    assert capsys.readouterr() == ("", f"rlinf: {tmp_path}/data.jsonl: the file is empty\n")


def test_a_solution_that_is_no_entry_of_reasoning_gym_is_named(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    bad = ("\\boxed{5}", "7", "[]", "{}", '"5"')
    path = write(tmp_path / "data.jsonl", *(record(k, "", task="rg/chain_sum", solutions=[text]) for k, text in enumerate(bad)))
    report = check(path)
    assert report["faults"] == {"gold_unreadable": len(bad)}
    assert [f["line"] for f in report["lines"]["gold_unreadable"]] == [1, 2, 3, 4, 5]
    assert all("no entry of reasoning-gym" in f["text"] for f in report["lines"]["gold_unreadable"])


def test_config_says_how_lines_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": "user", "content": "Is it \\boxed{5}?"}]
    path = write(tmp_path / "a.jsonl", {"chat": chat, "gold": "5"}, {"chat": chat, "gold": "5", "task": "unheard-of"})
    config = tmp_path / "a.yaml"
    config.write_text("data: {prompt_key: chat, answer_key: gold, apply_chat_template: true, tasks: [math]}\n")
    assert cli.main(["data", "check", str(path)]) == 2
    assert "no field `prompt` (data.prompt_key)" in (out := capsys.readouterr().out) and "name the run's --config" in out
    assert cli.main(["data", "check", str(path), "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "1 records; tasks: math 1" in out and "remark: 1 x leaked_answer" in out and out.endswith("fit to train on\n")
