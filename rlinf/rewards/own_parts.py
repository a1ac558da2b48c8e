"""Parts of a reward that functions of the user's own give (reward.own_parts). Each function has a cage of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from rlinf.config.own_code import check_own
from rlinf.data.records import Prompt, Sample, Status, Verdict
from rlinf.rewards.own import PART, Response, why_none
from rlinf.rewards.pool import Pool, Reply


class OwnParts:
    """functions: name of the part -> `path/to/file.py:function`. Thread-safe; the processes end with `close`.

    Raises UserError when a function cannot be called.
    """

    def __init__(self, functions: Mapping[str, str], num_processes: int, timeout: float) -> None:
        for function in functions.values():
            check_own("reward.own_parts", function)
        self.functions = functions
        self._pools = {name: Pool(num_processes, timeout, function) for name, function in functions.items()}

    def add(self, verdicts: Sequence[Verdict], responses: Sequence[Response]) -> list[Verdict]:
        """The verdicts with the parts added to their rewards; status and correctness do not change. When a function gives no number, its
        part is 0 and the verdict says so."""
        asked = [
            [(name, self._pools[name].submit((PART, function, response))) for name, function in self.functions.items()]
            for response in responses
        ]
        return [_with_parts(verdict, futures) for verdict, futures in zip(verdicts, asked, strict=True)]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _with_parts(verdict: Verdict, asked: Sequence[tuple[str, Future[Reply]]]) -> Verdict:
    for name, future in asked:
        reply = future.result()
        answer = reply.answer or {}
        value = None if reply.reason else answer.get("value")
        verdict = replace(
            verdict,
            reward=verdict.reward + (value or 0.0),
            parts=(*verdict.parts, (f"own/{name}", value or 0.0)),
            seconds=verdict.seconds + reply.seconds,
        )
        if value is None:
            why = why_none(reply)
            told = "; ".join(filter(None, (verdict.reason, f"{name}: {why}")))
            verdict = replace(verdict, failed=(*verdict.failed, (name, why)), reason=told)
    return verdict


def response_of(prompt: Prompt, prompt_text: str, text: str, verdict: Verdict, sample: Sample) -> Response:
    right = None if verdict.status is Status.UNDECIDED else verdict.status is Status.RIGHT
    about = prompt.solutions, prompt.task, verdict.extracted, right
    return Response(prompt_text, text, *about, len(sample), sample.finish.cut_off, prompt.metadata)
