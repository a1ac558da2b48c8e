"""Parts of a reward that functions of the user's own give: to each response alone (reward.own_parts), or to all responses to a problem at
once (reward.own_group_parts). Each function has a cage of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

from rlinf.config.own_code import check_own
from rlinf.config.schema import RewardConfig
from rlinf.data.records import Verdict
from rlinf.rewards.own import PART, Response, why_none
from rlinf.rewards.pool import Pool, Reply


class Call(NamedTuple):
    """A call of a function for the responses of these places."""

    part: str
    places: Sequence[int]
    reply: Future[Reply]


class OwnParts:
    """The functions of the section `reward`. Thread-safe; the processes end with `close`.

    Raises UserError when a function cannot be called.
    """

    def __init__(self, reward: RewardConfig, num_processes: int) -> None:
        self.alone, self.together = reward.own_parts, reward.own_group_parts
        for key, functions in (("reward.own_parts", self.alone), ("reward.own_group_parts", self.together)):
            for function in functions.values():
                check_own(key, function)
        every = self.alone | self.together
        self._pools = {name: Pool(num_processes, reward.seconds_of_own, function) for name, function in every.items()}

    def add(self, verdicts: Sequence[Verdict], responses: Sequence[Response]) -> list[Verdict]:
        """The verdicts with the parts added to their rewards; status and correctness do not change. When a function gives no number, its
        part is 0 and the verdict says so. responses: all that a function of reward.own_group_parts is given at once."""
        found, every = list(verdicts), range(len(responses))
        together = [Call(name, every, self._submit(name, function, True, responses)) for name, function in self.together.items()]
        alone = [
            Call(name, [i], self._submit(name, function, False, [response]))
            for i, response in enumerate(responses)
            for name, function in self.alone.items()
        ]
        for call in (*alone, *together):
            reply = call.reply.result()
            values = None if reply.reason else (reply.answer or {}).get("values")
            for i, value in zip(call.places, values or [None] * len(call.places), strict=True):
                found[i] = _with_part(found[i], call.part, value, reply, reply.seconds / len(call.places))
        return found

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _submit(self, name: str, function: str, together: bool, responses: Sequence[Response]) -> Future[Reply]:
        return self._pools[name].submit((PART, function, together, responses))


def _with_part(verdict: Verdict, name: str, value: float | None, reply: Reply, seconds: float) -> Verdict:
    """value: None = the function gave none, and the reply says why. seconds: this response's share of the call."""
    parts, failed, reason = (*verdict.parts, (f"own/{name}", value or 0.0)), verdict.failed, verdict.reason
    if value is None:
        why = why_none(reply)
        failed, reason = (*failed, (name, why)), "; ".join(filter(None, (reason, f"{name}: {why}")))
    reward, seconds = verdict.reward + (value or 0.0), verdict.seconds + seconds
    return replace(verdict, reward=reward, parts=parts, failed=failed, reason=reason, seconds=seconds)
