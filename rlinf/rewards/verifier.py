"""Verdicts: text in, reward with a reason out. Usable in a script, in a thread and in an actor."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from rlinf.data.records import Status, Verdict
from rlinf.rewards.extract import extract
from rlinf.rewards.math import Decision, judge_cheap
from rlinf.rewards.pool import Pool, Reply

REMEMBERED = 65536  # decided (task, answer, solutions) pairs kept, so that a duplicate is judged once


class Item(NamedTuple):
    """One response to judge. `prompt` (optional) tells whether the response begins inside an open <think>."""

    text: str
    solutions: tuple[str, ...]
    task: str = "math"
    prompt: str = ""


class Verifier:
    """Judges responses. Thread-safe; processes start when the first answer needs them (or at `warm_up`) and end with `close`."""

    def __init__(self, reward_scale: float = 5.0, undecided_reward: float | None = None, answer_format: str = "boxed", num_processes: int = 1,
                 timeout: float = 1.0) -> None:
        self.answer_format, self.num_processes, self.timeout = answer_format, num_processes, timeout
        undecided = -reward_scale if undecided_reward is None else undecided_reward
        self._rewards = {Status.RIGHT: reward_scale, Status.WRONG: -reward_scale, Status.UNDECIDED: undecided}
        self._pool: Pool | None = None
        self._lock = threading.Lock()
        self._decided: dict[tuple, Decision] = {}

    def verify(self, text: str, solutions: Sequence[str], task: str = "math", prompt: str = "") -> Verdict:
        return self.verify_many([Item(text, tuple(solutions), task, prompt)])[0]

    def verify_many(self, items: Sequence[Item]) -> list[Verdict]:
        """Verdicts in the order of the items. Equal (answer, solutions) pairs are judged once; only symbolic work leaves this process."""
        verdicts: list[Verdict | None] = [None] * len(items)
        waiting: dict[tuple, tuple[Future[Reply], list[tuple[int, str]]]] = {}
        for i, item in enumerate(items):
            started = time.perf_counter()
            answer, route = extract(item.text, item.prompt, self.answer_format)
            if answer is None:
                verdicts[i] = self._verdict(Decision("wrong", route), None, time.perf_counter() - started)
                continue
            key = (item.task, answer, item.solutions)
            decision = self._decided.get(key) or judge_cheap(answer, item.solutions)
            if decision is not None:
                self._remember(key, decision)
                verdicts[i] = self._verdict(decision, answer, time.perf_counter() - started)
            elif key in waiting:
                waiting[key][1].append((i, answer))
            else:
                waiting[key] = (self._workers().submit((answer, item.solutions)), [(i, answer)])
        for key, (future, places) in waiting.items():
            reply = future.result()
            decision = Decision(**reply.answer) if not reply.reason else Decision("undecided", reply.reason)
            self._remember(key, decision)
            for i, answer in places:
                verdicts[i] = self._verdict(decision, answer, reply.seconds)
        return verdicts

    def warm_up(self) -> None:
        """Start the processes now."""
        self._workers()

    def close(self) -> None:
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _workers(self) -> Pool:
        with self._lock:
            if self._pool is None:
                self._pool = Pool(self.num_processes, self.timeout)
            return self._pool

    def _remember(self, key: tuple, decision: Decision) -> None:
        if decision.status != "undecided":  # a time-out may be the machine's fault: the next one gets a new chance
            if len(self._decided) >= REMEMBERED:
                self._decided = {}
            self._decided[key] = decision

    def _verdict(self, decision: Decision, answer: str | None, seconds: float) -> Verdict:
        status = Status(decision.status)
        return Verdict(self._rewards[status], status, answer, decision.route, seconds, decision.reason)
