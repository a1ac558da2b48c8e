"""Equivalence of two mathematical answers, by routes in order of cost. Nothing here imports sympy before the cage asks for it."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rlinf.rewards.extract import last_box

MAX_ANSWER = 10_000  # characters; a longer answer is undecided unless it is the gold itself
_DECIMAL = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([-+]?\d{1,400})\}\{(\d{1,400})\}|([-+]?\d{1,400})/(\d{1,400})")


class Decision(NamedTuple):
    """status is a records.Status value; route names the rule that decided."""

    status: str
    route: str
    reason: str = ""


def plain(answer: str) -> str:
    return answer.strip().strip("$").rstrip(".").replace("−", "-").replace("{,}", ",").replace("\\!", "").replace("\\,", "").replace("\\left", "").replace("\\right", "").strip()


@lru_cache(maxsize=65536)
def rational(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match and len(text) < 4000 and (match[2] or match[3]):
        digits = match[2].replace(",", "") + (match[3] or "")
        return Fraction(int(match[1] + digits), 10 ** len(match[3] or ""))
    match = _FRACTION.fullmatch(text)
    if match:
        sign, top, bottom = (match[1], match[2], match[3]) if match[2] else ("", match[4], match[5])
        if int(bottom):
            return Fraction(int(top), int(bottom)) * (-1 if sign == "-" else 1)
    return None


@lru_cache(maxsize=65536)
def gold_text(solution: str) -> str:
    box = last_box(solution)
    return plain(solution if box is None else box)


def judge_cheap(answer: str, solutions: tuple[str, ...]) -> Decision | None:
    """The routes that stay in this process; None when symbolic work is needed."""
    text = plain(answer)
    if not text:
        return Decision("wrong", "empty")
    golds = [gold_text(s) for s in solutions]
    if text in golds:
        return Decision("right", "string")
    value = rational(text)
    values = [rational(g) for g in golds]
    if value is not None and all(v is not None for v in values):
        return Decision("right" if value in values else "wrong", "rational")
    if len(text) > MAX_ANSWER:
        return Decision("undecided", "too_long")
    return None


def warm_up() -> None:
    judge_symbolic("\\sqrt{4}", ("2",))


def judge_symbolic(answer: str, solutions: tuple[str, ...]) -> Decision:
    from math_verify import parse, verify

    got = parse(f"\\boxed{{{plain(answer)}}}", parsing_timeout=None)
    for solution in solutions:
        want = parse(f"\\boxed{{{gold_text(solution)}}}", parsing_timeout=None)
        if verify(want, got, timeout_seconds=None):
            return Decision("right", "symbolic")
    return Decision("wrong", "symbolic")
