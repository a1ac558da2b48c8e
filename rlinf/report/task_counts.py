"""Counts what the samples of a step say, by task: evidence for the rules that no curve has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

BOX = re.compile(r"^\\boxed\{(.*)\}$", re.S)


@dataclass
class TaskCounts:
    """Counts for one task.

    equal_not_right: samples whose extracted answer is written exactly like a solution, but was not judged right.
    right_unanswered: samples that were judged right without an extracted answer.
    contradictory: groups in which two different numbers were judged right although there is one solution.
    """

    samples: int = 0
    right: int = 0
    undecided: int = 0
    unanswered: int = 0
    equal: int = 0
    equal_not_right: int = 0
    right_unanswered: int = 0
    groups: int = 0
    contradictory: int = 0

    def __add__(self, other: TaskCounts) -> TaskCounts:
        return TaskCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class StepCounts:
    """Counts for one step. identical_groups: groups whose responses are all the same text. oldest_version: the oldest weight version of a
    token. unmarked: prompts without any marker of the chat template."""

    tasks: dict[str, TaskCounts] = field(default_factory=dict)
    groups: int = 0
    identical_groups: int = 0
    oldest_version: int | None = None
    unmarked: int = 0


def count_samples(rows: Sequence[dict[str, Any]], markers: Sequence[str]) -> StepCounts:
    """The counts of these samples. markers: the special tokens in the model's chat template."""
    counts = StepCounts()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group_id"], []).append(row)
        count_sample(counts.tasks.setdefault(row["task"], TaskCounts()), row)
    versions = [version for row in rows for version, _ in row["versions"]]
    counts.oldest_version = min(versions, default=None)
    for members in groups.values():
        task = counts.tasks[members[0]["task"]]
        counts.groups += 1
        task.groups += 1
        counts.identical_groups += len(members) > 1 and len({m["response"] for m in members}) == 1
        counts.unmarked += bool(markers) and not any(marker in members[0]["prompt"] for marker in markers)
        right = {number(m["extracted"]) for m in members if m["status"] == "right"} - {None}
        task.contradictory += len(members[0]["solutions"]) == 1 and len(right) > 1
    return counts


def count_sample(task: TaskCounts, row: dict[str, Any]) -> None:
    right = row["status"] == "right"
    equal = row["extracted"] is not None and plain(row["extracted"]) in {plain(s) for s in row["solutions"]}
    task.samples += 1
    task.right += right
    task.undecided += row["status"] == "undecided"
    task.unanswered += row["extracted"] is None
    task.equal += equal
    task.equal_not_right += equal and not right
    task.right_unanswered += right and row["extracted"] is None


def plain(answer: str) -> str:
    """The answer without its box, dollar signs and blanks."""
    text = answer.strip().strip("$").strip()
    match = BOX.match(text)
    return re.sub(r"\s|\\[,;! ]", "", match[1] if match else text).rstrip(".")


def number(answer: str | None) -> float | None:
    """A whole number as it is written, or None: numbers in other forms may be written differently and still be equal."""
    text = plain(answer or "")
    return float(text) if re.fullmatch(r"-?\d{1,15}", text) else None


def totals(steps: Iterable[StepCounts]) -> dict[str, TaskCounts]:
    """The counts by task, summed over several steps."""
    found: dict[str, TaskCounts] = {}
    for step in steps:
        for name, counts in step.tasks.items():
            found[name] = found.get(name, TaskCounts()) + counts
    return found
