"""The verifier: judges responses and returns verdicts with a reward and a reason. It can be used in a script, in a thread and in a Ray
actor."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from rlinf.config.own_code import check_own, is_own
from rlinf.config.schema import RewardConfig
from rlinf.data.records import Status, Verdict
from rlinf.rewards.math.copied import copies_question
from rlinf.rewards.math.decide import Decision
from rlinf.rewards.math.extract import extract
from rlinf.rewards.own import why_none
from rlinf.rewards.pool import Pool, Reply
from rlinf.rewards.tasks import judge_cheap

REMEMBERED = 65536  # decided (task, answer, solutions) triples kept, so that a duplicate is judged once


class Item(NamedTuple):
    """One response to judge.

    prompt (optional): says whether the response begins inside an open <think>, and which answers would only copy the question.
    """

    text: str
    solutions: tuple[str, ...]
    task: str = "math"
    prompt: str = ""


class Verifier:
    """Judges responses. Thread-safe. Its processes start when the first answer needs them (or in `warm_up`), and end in `close`.

    reward_scale: reward of a right answer; a wrong one gets its negative. undecided_reward: None = as for a wrong answer. own_tasks,
    own_timeout: of the section `reward`.
    """

    def __init__(
        self,
        reward_scale: float = 5.0,
        undecided_reward: float | None = None,
        answer_format: str = "boxed",
        num_processes: int = 1,
        timeout: float = 1.0,
        own_tasks: Mapping[str, str] | None = None,
        own_timeout: float | None = None,
    ) -> None:
        self.own_tasks = own_tasks or {}
        self.answer_format, self.num_processes, self.timeout = answer_format, num_processes, timeout
        self.own_timeout = timeout if own_timeout is None else own_timeout
        undecided = -reward_scale if undecided_reward is None else undecided_reward
        self._rewards = {Status.RIGHT: reward_scale, Status.WRONG: -reward_scale, Status.UNDECIDED: undecided}
        self._pools: dict[str, Pool] = {}
        self._lock = threading.Lock()
        self._decided: dict[tuple, Decision] = {}

    @classmethod
    def of(cls, reward: RewardConfig, num_processes: int) -> Verifier:
        """A verifier with the settings of the section `reward`. Raises UserError when a function of reward.own_tasks cannot be called."""
        for function in reward.own_tasks.values():
            check_own("reward.own_tasks", function)
        limits = num_processes, reward.timeout, reward.own_tasks, reward.seconds_of_own
        return cls(reward.reward_scale, reward.undecided_reward, reward.answer_format, *limits)

    def verify(self, text: str, solutions: Sequence[str], task: str = "math", prompt: str = "") -> Verdict:
        return self.verify_many([Item(text, tuple(solutions), task, prompt)])[0]

    def verify_many(self, items: Sequence[Item]) -> list[Verdict]:
        """Verdicts in the order of the items. Equal (answer, solutions) pairs are judged once; only symbolic work leaves this process.

        Raises UserError for an unknown task.
        """
        verdicts: dict[int, Verdict] = {}
        waiting: dict[tuple, tuple[Future[Reply], list[int]]] = {}
        for i, item in enumerate(items):
            started = time.perf_counter()
            answer, route = extract(item.text, item.prompt, self.answer_format)
            if answer is None:
                verdicts[i] = self._verdict(Decision("wrong", route), None, item, time.perf_counter() - started)
                continue
            own = self.own_tasks.get(item.task)
            key = (own or item.task, answer, item.solutions)
            decision = self._decided.get(key) or (None if own else judge_cheap(*key))
            if decision is not None:
                self._remember(key, decision)
                verdicts[i] = self._verdict(decision, answer, item, time.perf_counter() - started)
            elif key in waiting:
                waiting[key][1].append(i)
            else:
                waiting[key] = (self._pool_for(own or item.task).submit(key), [i])
        for key, (future, places) in waiting.items():
            reply = future.result()
            said = reply.answer or {}
            why = why_none(reply) if is_own(key[0]) else said.get("why", "")
            decision = Decision("undecided", reply.reason, why) if reply.reason else Decision(**said)
            self._remember(key, decision)
            for i in places:
                verdicts[i] = self._verdict(decision, key[1], items[i], reply.seconds)
        return [verdicts[i] for i in range(len(items))]

    def warm_up(self) -> None:
        """Start the processes now."""
        for kind in ("math", *self.own_tasks.values()):
            self._pool_for(kind)

    def close(self) -> None:
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def worker_pids(self) -> list[int]:
        with self._lock:
            return [pid for pool in self._pools.values() for pid in pool.worker_pids()]

    def _pool_for(self, task: str) -> Pool:
        kind = "rg" if task.startswith("rg/") else task if is_own(task) else "math"
        with self._lock:
            if kind not in self._pools:
                self._pools[kind] = Pool(self.num_processes, self.own_timeout if is_own(kind) else self.timeout, kind)
            return self._pools[kind]

    def _remember(self, key: tuple, decision: Decision) -> None:
        if decision.status != "undecided":  # a time-out may be the machine's fault: the next one gets a new chance
            if len(self._decided) >= REMEMBERED:
                self._decided = {}
            self._decided[key] = decision

    def _verdict(self, decision: Decision, answer: str | None, item: Item, seconds: float) -> Verdict:
        right = decision.status == "right"
        if right and answer and item.prompt and item.task == "math" and copies_question(answer, item.solutions, item.prompt):
            decision = Decision("wrong", "copied_question", "the box holds a formula of the question, not its value")
        status = Status(decision.status)
        return Verdict(self._rewards[status], status, answer, decision.route, seconds, decision.reason)
