"""`rlinf verify`: judges a JSONL file; each line `{"response": str, "solutions": [str, ...], "task": "math"}` is written again with its
verdict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rlinf.config.schema import RewardConfig
from rlinf.data.jsonl import BadLine, Fault, atomic_write, read_file, refuse_itself
from rlinf.data.records import Verdict
from rlinf.errors import UserError
from rlinf.rewards.tasks import check_tasks
from rlinf.rewards.verifier import Item, Verifier

LINES_AT_ONCE = 4096


def verify_file(in_path: str | Path, out_path: str | Path, processes: int = 1, reward: RewardConfig | None = None) -> dict[str, Any]:
    """Write every line of in_path to out_path with `reward`, `status`, `route`, `extracted`, `seconds` and `reason`; returns counts.

    A line may also have `prompt`. reward: the section of a run's configuration; None = its defaults. The file is written atomically. Raises
    UserError that names the line which cannot be judged, or says why the file cannot be read.
    """
    source, target = Path(in_path), Path(out_path)
    refuse_itself(source, target)
    statuses: Counter[str] = Counter()
    routes: Counter[str] = Counter()
    with Verifier.of(reward or RewardConfig(), processes) as verifier, atomic_write(target) as out:
        rows = _rows(source, verifier.own_tasks)
        while chunk := list(islice(rows, LINES_AT_ONCE)):
            verdicts = verifier.verify_many([item for _, item in chunk])
            for (row, _), verdict in zip(chunk, verdicts):
                out.write(json.dumps(row | judged(verdict)) + "\n")
                statuses[verdict.status.value] += 1
                routes[verdict.route] += 1
    return {
        "lines": sum(statuses.values()),
        **{s: statuses[s] for s in ("right", "wrong", "undecided")},
        "routes": dict(routes.most_common()),
    }


def judged(verdict: Verdict) -> dict[str, Any]:
    return {
        "reward": verdict.reward,
        "status": verdict.status.value,
        "route": verdict.route,
        "extracted": verdict.extracted,
        "seconds": round(verdict.seconds, 6),
        "reason": verdict.reason,
    }


def _rows(path: Path, own_tasks: Collection[str]) -> Iterator[tuple[dict[str, Any], Item]]:
    check_tasks([], own_tasks)
    for read in read_file(path, partial(_row, own_tasks=own_tasks, known=set())):
        if isinstance(read, Fault):
            raise UserError(f"{read.file}:{read.line}: {read.reason}")
        yield read


def _row(row: dict[str, Any], path: Path, number: int, own_tasks: Collection[str], known: set[str]) -> tuple[dict[str, Any], Item]:
    if not isinstance(row.get("response"), str):
        raise BadLine('needs "response", a string')
    solutions = row.get("solutions")
    if not isinstance(solutions, list) or not solutions or not all(isinstance(s, str) for s in solutions):
        raise BadLine('needs "solutions", a list of at least one string')
    task, prompt = row.get("task", "math"), row.get("prompt", "")
    if not isinstance(task, str) or not isinstance(prompt, str):
        raise BadLine('"task" and "prompt" must be strings')
    if task not in known:
        try:
            check_tasks([task], own_tasks, "fix the line")
        except UserError as error:
            raise BadLine(str(error)) from error
        known.add(task)
    return row, Item(row["response"], tuple(solutions), task, prompt)
