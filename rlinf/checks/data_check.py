"""`rlinf data check FILE`: checks whether a file is fit to train on. Every solution is judged against itself and against wrong answers that
are near to it.

A fault makes training wrong (a solution that no answer can match, a wrong answer that would be rewarded); a remark is for people to judge.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlinf.config.schema import DataConfig, RewardConfig
from rlinf.data.jsonl import Fault, read_file
from rlinf.data.prompts import parse_prompt
from rlinf.errors import UserError
from rlinf.rewards.math.decide import gold_answer, gold_reading, simple_number
from rlinf.rewards.tasks import check_tasks, letter_of
from rlinf.rewards.verifier import Item, Verifier

SHOWN = 10  # lines named for each kind of finding
FAULTS = {
    "bad_line": "not a record: JSON with `prompt`, `solutions` and, if you like, `task` and `query_id` "
    "(name the run's --config if its section `data` says otherwise)",
    "unknown_task": "no verifier for the task (name the run's --config if it has reward.own_tasks, or leave the task out with data.tasks)",
    "gold_unreadable": "a solution that cannot be read; only the same characters would match it",
    "gold_not_right": "a solution that is not judged right against itself",
    "near_miss_right": "a near-miss of the solution that is judged right",
}
REMARKS = {
    "duplicate_prompt": "the same prompt again",
    "conflicting_golds": "the same prompt with other solutions",
    "duplicate_id": "a query_id that was used before",
    "leaked_answer": "the prompt gives the boxed answer away",
    "gold_undecided": "a solution that took too long to judge against itself",
}


@dataclass(frozen=True)
class Row:
    line: int
    prompt: str
    task: str
    query_id: str
    solutions: tuple[str, ...]


@dataclass
class Findings:
    lines: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, line: int, text: str = "") -> None:
        self.lines[kind].append((line, text))


def main(path: str | Path, as_json: bool = False, reward: RewardConfig | None = None, data: DataConfig | None = None) -> int:
    """Print the report; 0 when there is no fault, 2 when there is one.

    reward, data: the sections of a run's configuration; None = their defaults.
    """
    report = check(Path(path), reward=reward, data=data)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if as_json else describe(report))
    return 2 if report["faults"] else 0


def check(path: Path, processes: int = 1, reward: RewardConfig | None = None, data: DataConfig | None = None) -> dict[str, Any]:
    """The report as plain data. Raises UserError when the file cannot be read at all, like a run."""
    findings = Findings()
    rows = list(_rows(path, findings, data or DataConfig()))
    _check_repetition(rows, findings)
    with Verifier.of(reward or RewardConfig(), processes) as verifier:
        known = _known_tasks(rows, verifier.own_tasks, findings)
        judged = [r for r in rows if r.task in known]
        _check_golds(judged, verifier, findings)
    lengths = [len(r.prompt) for r in rows]
    shown = {kind: [{"line": n, "text": text[:200]} for n, text in found[:SHOWN]] for kind, found in findings.lines.items()}
    return {
        "file": str(path),
        "records": len(rows),
        "tasks": dict(Counter(r.task for r in rows).most_common()),
        "solutions_per_record": dict(sorted(Counter(len(r.solutions) for r in rows).items())),
        "gold_kinds": dict(Counter(_kind(s) for r in judged if r.task == "math" for s in r.solutions).most_common()),
        "prompt_characters": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)} if lengths else {},
        "faults": {kind: len(findings.lines[kind]) for kind in FAULTS if kind in findings.lines},
        "remarks": {kind: len(findings.lines[kind]) for kind in REMARKS if kind in findings.lines},
        "lines": shown,
    }


def describe(report: dict[str, Any]) -> str:
    tasks = ", ".join(f"{task} {n}" for task, n in report["tasks"].items()) or "none"
    kinds = ", ".join(f"{kind} {n}" for kind, n in report["gold_kinds"].items())
    lengths = report["prompt_characters"]
    out = [f"{report['file']}: {report['records']} records; tasks: {tasks}" + (f"; golds: {kinds}" if kinds else "")]
    if lengths:
        out.append(f"prompt length in characters: {lengths['min']} to {lengths['max']}, median {lengths['median']:g}")
    for title, table, counts in (("fault", FAULTS, report["faults"]), ("remark", REMARKS, report["remarks"])):
        for kind, count in counts.items():
            out.append(f"{title}: {count} x {kind}: {table[kind]}")
            out += [f"    line {f['line']}" + (f": {f['text']}" if f["text"] else "") for f in report["lines"][kind]]
    out.append("fit to train on" if not report["faults"] else "fix the faults first")
    return "\n".join(out) + "\n"


def near_misses(gold: str) -> list[str]:
    """Wrong answers near to a solution: one more, ten times as much, the negative, half, and one member fewer."""
    value = simple_number(gold)
    if value is not None:
        if value == 0:
            return ["1", "-1"]
        return [str(value + 1), str(value - 1), str(-value), str(value * 10), str(value / 10)]
    if letter := letter_of(gold):
        return ["B" if letter == "A" else "A", f"{letter} or {'B' if letter == 'A' else 'A'}"]
    node = next((r.node for r in gold_reading(gold).readings if r.node is not None), None)
    if node is None or node.op in ("text", "date", "clock"):
        return [f"{gold} \\text{{ or not}}", ""]
    if node.op in ("list", "set", "tuple") and len(node.args) > 1:
        return [f"{gold}, 98765"]
    return [f"{gold} + 1", f"98765, {gold}"] if node.op not in ("rel", "member") else [f"98765, {gold}"]


def _rows(path: Path, findings: Findings, data: DataConfig) -> Iterator[Row]:
    """The prompts that a run with this section `data` reads, by the same functions; of a chat, its turns."""
    for record in read_file(path, partial(parse_prompt, data=data)):
        if isinstance(record, Fault):
            findings.add("bad_line", record.line, record.reason)
        elif data.tasks is None or record.task in data.tasks:
            prompt = record.prompt if isinstance(record.prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in record.prompt)
            yield Row(record.line, prompt, record.task, record.query_id, record.solutions)


def _known_tasks(rows: list[Row], own: Collection[str], findings: Findings) -> set[str]:
    known = set()
    for task in {r.task for r in rows}:
        try:
            check_tasks([task], own if task in own else ())
            known.add(task)
        except UserError as error:
            for row in (r for r in rows if r.task == task):
                findings.add("unknown_task", row.line, str(error))
    return known


def _check_repetition(rows: list[Row], findings: Findings) -> None:
    prompts: dict[str, Row] = {}
    ids: dict[str, Row] = {}
    for row in rows:
        text = " ".join(row.prompt.split())
        first = prompts.setdefault(text, row)
        if first is not row:
            same = sorted(map(gold_answer, first.solutions)) == sorted(map(gold_answer, row.solutions))
            findings.add("duplicate_prompt" if same else "conflicting_golds", row.line, f"as line {first.line}")
        if ids.setdefault(row.query_id, row) is not row:
            findings.add("duplicate_id", row.line, f"{row.query_id}, as line {ids[row.query_id].line}")


def _check_golds(rows: list[Row], verifier: Verifier, findings: Findings) -> None:
    for row in rows:
        for solution in row.solutions:
            gold = gold_answer(solution)
            if row.task == "math":
                if all(r.node is None and not r.letter for r in gold_reading(solution).readings) and not gold_reading(solution).unsupported:
                    findings.add("gold_unreadable", row.line, gold)
            elif row.task == "choice" and letter_of(gold) is None:
                findings.add("gold_unreadable", row.line, f"{gold} is no letter")
            elif row.task.startswith("rg/") and _entry_answer(solution) is None:
                findings.add("gold_unreadable", row.line, f'no entry of reasoning-gym, {{"answer": ..., "metadata": ...}}: {solution}')
            if row.task == "math" and re.search(r"\\boxed\s*\{\s*" + re.escape(gold) + r"\s*\}", row.prompt):
                findings.add("leaked_answer", row.line, gold)
    readable = [r for r in rows if not r.task.startswith("rg/") or all(_entry_answer(s) is not None for s in r.solutions)]
    for kind, judged in (("self", _self_items(readable)), ("near", _near_items(rows))):
        for (row, answer), verdict in zip(
            judged, verifier.verify_many([Item(f"\\boxed{{{answer}}}", row.solutions, row.task) for row, answer in judged])
        ):
            if kind == "near" and verdict.status.value == "right":
                findings.add("near_miss_right", row.line, f"{answer} for {gold_answer(row.solutions[0])}")
            elif kind == "self" and verdict.status.value == "wrong":
                findings.add("gold_not_right", row.line, f"{answer}: {verdict.reason or verdict.route}")
            elif kind == "self" and verdict.status.value == "undecided":
                findings.add("gold_undecided", row.line, f"{answer}: {verdict.route} {verdict.reason}")


def _self_items(rows: list[Row]) -> list[tuple[Row, str]]:
    """Every solution as an answer to its own problem; for reasoning-gym, the answer inside the entry."""
    items = []
    for row in rows:
        for solution in row.solutions:
            answer = _entry_answer(solution) if row.task.startswith("rg/") else gold_answer(solution)
            items += [(row, answer)] if answer is not None else []
    return items


def _entry_answer(solution: str) -> str | None:
    """The answer inside an entry of reasoning-gym; None when the solution is not such an entry."""
    try:
        return str(json.loads(solution)["answer"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _near_items(rows: list[Row]) -> list[tuple[Row, str]]:
    golds = {row: {gold_answer(s) for s in row.solutions} for row in rows if row.task == "math"}
    return [(row, miss) for row in golds for gold in golds[row] for miss in near_misses(gold) if miss not in golds[row]]


def _kind(solution: str) -> str:
    value = simple_number(gold_answer(solution))
    if value is not None:
        return "integer" if value.denominator == 1 else "rational"
    node = next((r.node for r in gold_reading(solution).readings if r.node is not None), None)
    if node is None:
        return "choice" if any(r.letter for r in gold_reading(solution).readings) else "unreadable"
    return {
        "tuple": "tuple or interval",
        "list": "several",
        "rel": "relation",
        "assign": "relation",
        "text": "words",
        "set": "set",
        "matrix": "matrix",
    }.get(node.op, "expression")
