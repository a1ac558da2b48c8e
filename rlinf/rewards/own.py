"""Calls functions of the user's own, in the cage: they judge answers (reward.own_tasks), or give a part of the reward
(reward.own_parts)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from traceback import extract_tb
from typing import Any, NamedTuple

from rlinf.config.own_code import file_of, load_own
from rlinf.rewards.math.decide import Decision
from rlinf.rewards.pool import Reply
from rlinf.rewards.reasoning_gym import SCORER_ERRORS

ERRORS = (*SCORER_ERRORS, NameError, ImportError, OSError, RuntimeError, StopIteration)  # any other costs the worker its life
PART = "part"  # what an item for the cage that asks for a part begins with


class Response(NamedTuple):
    """The argument of a function of reward.own_parts.

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
        verdict = judge(answer, solutions)
        if verdict is not None and verdict not in (True, False):
            raise TypeError(f"it returned {verdict!r}; a function of reward.own_tasks returns True, False or None")
    except RecursionError:  # the cage has a name for it
        raise
    except ERRORS as error:
        return Decision("undecided", "own_failed", told(error, function))
    return Decision("undecided" if verdict is None else "right" if verdict else "wrong", "own")


def give_part(function: str, fields: Sequence[Any]) -> dict[str, Any]:
    """Call a function of reward.own_parts; returns its number, or why there is none."""
    response, part = Response(*fields), load_own(function)
    try:
        value = part(response._replace(solutions=tuple(response.solutions)))
        if callable(item := getattr(value, "item", None)):  # a tensor or an array of one number
            value = item()
        if not isinstance(value, Real) or not math.isfinite(value):
            raise TypeError(f"it returned {value!r}; a function of reward.own_parts returns a finite number")
    except RecursionError:  # the cage has a name for it
        raise
    except ERRORS as error:
        return {"value": None, "why": told(error, function)}
    return {"value": float(value)}


def told(error: BaseException, function: str) -> str:
    """The error of a user's function as a message, with the line of its file."""
    file = file_of(function)
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{type(error).__name__}: {error}"[:200] + (f" ({file.name}:{lines[-1]})" if lines else "")


def why_none(reply: Reply) -> str:
    """Why the cage has no result of a user's function; empty when the function itself says so."""
    if reply.reason == "timeout":
        return f"no result after {reply.seconds:.1f} s (reward.timeout); heavy imports belong at the top of the file"
    return str((reply.answer or {}).get("why") or reply.reason)
