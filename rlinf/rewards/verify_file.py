"""`rlinf verify`: judges a JSONL file; each line `{"response": str, "solutions": [str, ...], "task": "math"}` is written again with its
verdict and its reward."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any, NamedTuple

from rlinf.config.schema import Config, RewardConfig
from rlinf.data.jsonl import BadLine, Fault, Row, atomic_write, read_file, refuse_itself
from rlinf.data.records import Finish, Status, Verdict
from rlinf.errors import UserError
from rlinf.rewards.tasks import check_tasks
from rlinf.rewards.verifier import Item
from rlinf.rewards.whole import Answer, WholeReward

LINES_AT_ONCE = 4096
GIVEN_LENGTHS = ("own_parts", "own_group_parts", "overlong_buffer", "exploration_penalty")  # keys of the section `reward`
FINISHES = ", ".join(finish.value for finish in Finish)


class Line(NamedTuple):
    """problem: the same for all lines that a function of reward.own_group_parts is given at once."""

    row: Row
    answer: Answer
    problem: str


def verify_file(in_path: str | Path, out_path: str | Path, processes: int = 1, config: Config | None = None) -> dict[str, Any]:
    """Write every line of in_path to out_path with `reward`, `status`, `route`, `extracted`, `parts`, `seconds` and `reason`; returns
    counts and means.

    What a line may have: see Lines. config: of a run; None = the defaults. processes: for the verifier, and for each function of the
    user's own. The file is written atomically. Raises UserError that names the line which cannot be judged, or says why the file cannot be
    read.
    """
    source, target = Path(in_path), Path(out_path)
    refuse_itself(source, target)
    config = config or Config()
    total = Summary(config.reward)
    check_tasks([], config.reward.own_tasks)
    with WholeReward(config, processes) as reward, ThreadPoolExecutor(processes) as threads, atomic_write(target) as out:
        for problems in _chunks(_rows(source, Lines(config.reward)), bool(config.reward.own_group_parts)):
            answers = [[line.answer for line in lines] for lines in problems]
            judged = iter(reward.verifier.verify_many([answer.item for answer in chain.from_iterable(answers)]))
            paid = threads.map(reward.pay, answers, [[next(judged) for _ in some] for some in answers])
            for line, verdict in zip(chain.from_iterable(problems), chain.from_iterable(paid), strict=True):
                out.write(json.dumps(line.row | judged_row(verdict)) + "\n")
                total.add(verdict, line.answer.item.task)
    return total.described()


def judged_row(verdict: Verdict) -> dict[str, Any]:
    return {
        "reward": verdict.reward,
        "status": verdict.status.value,
        "route": verdict.route,
        "extracted": verdict.extracted,
        "parts": dict(verdict.parts),
        "seconds": round(verdict.seconds, 6),
        "reason": verdict.reason,
    }


class Summary:
    """What `rlinf verify` tells at its end: counts of verdicts, means of the reward and of its parts, and which functions failed."""

    def __init__(self, reward: RewardConfig) -> None:
        self.own_tasks = reward.own_tasks
        self.statuses, self.routes = Counter[str](), Counter[str]()
        self.sums, self.failed = defaultdict[str, float](float), defaultdict[str, list[str]](list)

    def add(self, verdict: Verdict, task: str) -> None:
        self.statuses[verdict.status.value] += 1
        self.routes[verdict.route] += 1
        for name, value in (("reward", verdict.reward), *((f"part {name}", value) for name, value in verdict.parts)):
            self.sums[name] += value
        for name, why in verdict.failed:
            self.failed[f"part own/{name}"].append(why)
        if task in self.own_tasks and verdict.status is Status.UNDECIDED and verdict.route != "own":
            self.failed[f"task {task}"].append(verdict.reason or verdict.route)

    def described(self) -> dict[str, Any]:
        lines = self.statuses.total()
        counts = {
            "lines": lines,
            **{s: self.statuses[s] for s in ("right", "wrong", "undecided")},
            "routes": dict(self.routes.most_common()),
        }
        means = {name: float(f"{total / lines:.6g}") for name, total in self.sums.items()}
        return (
            counts | means | {f"failed in {name}": f"{len(whys)} of {lines} lines, first: {whys[0]}" for name, whys in self.failed.items()}
        )


class Lines:
    """Reads lines one after another, under the section `reward`. Beside `response` and `solutions` a line may have

    prompt, task       of the problem
    length, finish     the tokens of the response and why it ended, as in samples/ of a run; `length` must be there when the reward
                       depends on it, `finish` is `stop` where it is not there
    group_id           lines with the same one are of one problem; without it those with the same prompt, task and solutions
    metadata           of the problem; in samples/ it stands in the first line of each
    """

    def __init__(self, reward: RewardConfig) -> None:
        self.reward, self.known = reward, set[str]()
        self.need_length = [f"reward.{name}" for name in GIVEN_LENGTHS if getattr(reward, name)]
        self.problem, self.last = "", dict[str, int]()  # problem -> its last line
        self.metadata: Any = None

    def read(self, row: Row, path: Path, number: int) -> Line:
        item = self._item(row)
        problem = json.dumps([row["group_id"]] if "group_id" in row else [item.prompt, item.task, item.solutions])
        if self.reward.own_group_parts:
            if "group_id" not in row and "prompt" not in row:
                raise BadLine('needs "prompt", or "group_id": reward.own_group_parts are given all lines of a problem at once')
            if problem != self.problem and problem in self.last:
                raise BadLine(
                    f"is of the same problem as line {self.last[problem]}, with others between them; put all lines of a problem one after "
                    'another, since reward.own_group_parts are given them at once, or tell groups apart by "group_id"'
                )
            self.last[problem] = number
        self.metadata = row.get("metadata", self.metadata if problem == self.problem else None)
        self.problem = problem
        return Line(row, Answer(item, *self._length(row), self.metadata), problem)

    def _item(self, row: Row) -> Item:
        if not isinstance(row.get("response"), str):
            raise BadLine('needs "response", a string')
        solutions = row.get("solutions")
        if not isinstance(solutions, list) or not solutions or not all(isinstance(s, str) for s in solutions):
            raise BadLine('needs "solutions", a list of at least one string')
        task, prompt = row.get("task", "math"), row.get("prompt", "")
        if not isinstance(task, str) or not isinstance(prompt, str):
            raise BadLine('"task" and "prompt" must be strings')
        if task not in self.known:
            try:
                check_tasks([task], self.reward.own_tasks, "fix the line")
            except UserError as error:
                raise BadLine(str(error)) from error
            self.known.add(task)
        return Item(row["response"], tuple(solutions), task, prompt)

    def _length(self, row: Row) -> tuple[int, bool]:
        """(tokens of the response, whether it was cut off), where the reward depends on them."""
        if not self.need_length:
            return 0, False
        length, finish = row.get("length"), row.get("finish", Finish.STOP.value)
        if type(length) is not int or length < 0:
            raise BadLine(f'needs "length", the number of tokens of the response, for {" and ".join(self.need_length)}')
        if finish not in list(Finish):
            raise BadLine(f'"finish" is {json.dumps(finish)}; it must be one of {FINISHES}')
        return length, Finish(finish).cut_off


def _rows(path: Path, lines: Lines) -> Iterator[Line]:
    for read in read_file(path, lines.read):
        if isinstance(read, Fault):
            raise UserError(f"{read.file}:{read.line}: {read.reason}")
        yield read


def _chunks(rows: Iterable[Line], together: bool) -> Iterator[list[list[Line]]]:
    """Problems, some thousand lines at a time. together: whether the lines of a problem belong together; otherwise each stands alone."""
    chunk, size, numbers = list[list[Line]](), 0, count()
    for _, some in groupby(rows, key=lambda line: line.problem if together else next(numbers)):
        chunk.append(list(some))
        size += len(chunk[-1])
        if size >= LINES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
