"""Calls functions of the user's own, in the cage: they judge answers (reward.own_tasks), or give a part of the reward
(reward.own_parts, reward.own_group_parts). What an `async def` returns is awaited."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Real
from traceback import extract_tb
from typing import Any, NamedTuple

from rlinf.config.own_code import file_of, load_own
from rlinf.rewards.math.decide import Decision
from rlinf.rewards.pool import Reply
from rlinf.rewards.reasoning_gym import SCORER_ERRORS

ERRORS = (*SCORER_ERRORS, NameError, ImportError, OSError, RuntimeError, StopIteration)  # any other costs the worker its life
PART = "part"  # what an item for the cage that asks for a part begins with
ONE = "a function of reward.own_parts returns a finite number"
ONE_EACH = "a function of reward.own_group_parts returns a list of one finite number for each response"


class Response(NamedTuple):
    """What a function of reward.own_parts is given one of, and a function of reward.own_group_parts a list of.

    solutions, task, metadata: of the prompt. answer: what was found in the response, or None. right: what the verifier says; None when it
    cannot decide. tokens: of the response. cut_off: whether the response ended at a limit.
    """

    prompt: str
    text: str
    solutions: tuple[str, ...]
    task: str
    answer: str | None
    right: bool | None
    tokens: int
    cut_off: bool
    metadata: Any


def judge_own(function: str, answer: str, solutions: tuple[str, ...]) -> Decision:
    """Judge by a function (answer, solutions) -> True, False, or None for undecided. Any other result is an error: a score of 0.1, or of
    -1, would count as right."""
    judge = load_own(function)
    try:
        verdict = _result(judge, answer, solutions)
        if verdict is not None and verdict not in (True, False):
            raise TypeError(f"it returned {verdict!r}; a function of reward.own_tasks returns True, False or None")
    except RecursionError:  # the cage has a name for it
        raise
    except ERRORS as error:
        return Decision("undecided", "own_failed", told(error, function))
    return Decision("undecided" if verdict is None else "right" if verdict else "wrong", "own")


def give_part(function: str, together: bool, responses: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Call a function of reward.own_group_parts with all responses (`together`), or one of reward.own_parts with the only one; returns
    the numbers, one for each response, or why there are none."""
    part, given = load_own(function), [Response(*fields) for fields in responses]
    given = [response._replace(solutions=tuple(response.solutions)) for response in given]
    try:
        values = _numbers(_result(part, given), len(given)) if together else [_number(_result(part, *given), f"; {ONE}")]
    except RecursionError:  # the cage has a name for it
        raise
    except ERRORS as error:
        return {"values": None, "why": told(error, function)}
    return {"values": values}


def _result(function: Callable[..., Any], *arguments: Any) -> Any:
    value = function(*arguments)
    return _loop().run_until_complete(value) if inspect.iscoroutine(value) else value


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls in a process: a client that the user's file keeps belongs to the loop in which it was first used."""
    return asyncio.new_event_loop()


def _numbers(values: Any, count: int) -> list[float]:
    if isinstance(values, (str, Mapping)) or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        raise TypeError(f"it returned {values!r:.80}; {ONE_EACH}")
    if len(values) != count:
        raise ValueError(f"it returned {len(values)} numbers for {count} responses; {ONE_EACH}")
    return [_number(value, f" for response {i}; {ONE_EACH}") for i, value in enumerate(values)]


def _number(value: Any, expected: str) -> float:
    if callable(item := getattr(value, "item", None)):  # a tensor or an array of one number
        value = item()
    if not isinstance(value, Real) or not math.isfinite(value):
        raise TypeError(f"it returned {value!r}{expected}")
    return float(value)


def told(error: BaseException, function: str) -> str:
    """The error of a user's function as a message, with the line of its file; of a group of errors (asyncio.TaskGroup) the first."""
    file = file_of(function)
    while isinstance(inner := getattr(error, "exceptions", None), tuple) and inner:
        error = inner[0]
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{type(error).__name__}: {error}"[:200] + (f" ({file.name}:{lines[-1]})" if lines else "")


def why_none(reply: Reply) -> str:
    """Why the cage has no result of a user's function; empty when the function itself says so."""
    if reply.reason == "timeout":
        return f"no result after {reply.seconds:.1f} s (reward.own_timeout); heavy imports belong at the top of the file"
    return str((reply.answer or {}).get("why") or reply.reason)
