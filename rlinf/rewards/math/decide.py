"""The verdict on one mathematical answer, by routes in order of cost. See docs/verifier.md for every decision.

string      the cleaned answer is the cleaned gold
number      both are integers, fractions or finite decimals: compared exactly
structure   read by the grammar, compared part by part, every part exact
numeric     expressions compared with mpmath, in the cage
math-verify what our grammar does not read (integrals, sums, limits, ...), in the cage
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rlinf.rewards.math.compare import APPROXIMATE_DIGITS, Judge, equal
from rlinf.rewards.math.evaluate import NoValue, TooBig
from rlinf.rewards.math.extract import last_box
from rlinf.rewards.math.forms import Malformed, Node, TooDeep, Unknown, Unsupported
from rlinf.rewards.math.judges import NeedsCage, NumericJudge, RationalJudge, rounds_exactly
from rlinf.rewards.math.normalise import LookAlike, clean, readings, without_domain
from rlinf.rewards.math.parse import parse
from rlinf.rewards.math.words import choice, special, text_node

MAX_ANSWER = 5_000  # characters; a longer answer is right when it is the gold itself, else undecided
CHEAP_DEPTH, CAGE_DEPTH = 40, 400
_INTEGER = re.compile(r"[-+]?(?:\d{1,400}|\d{1,3}(?:,\d{3})+)", re.ASCII)
_DECIMAL = re.compile(r"([-+]?)(\d{0,400})\.(\d{1,400})", re.ASCII)
_FRACTION = re.compile(r"([-+]?)(?:\\[dtc]?frac\{(-?\d{1,400})\}\{(\d{1,400})\}|(\d{1,400})/(\d{1,400}))", re.ASCII)


class Decision(NamedTuple):
    """status is a records.Status value; route names the rule that decided; reason is for people."""

    status: str
    route: str
    reason: str = ""


class Reading(NamedTuple):
    """One way to read an answer. letter: the choice label in front of it. domain: the domain of a parameter that was taken off (`k in
    Z`)."""

    node: Node | None
    letter: str
    fault: str
    domain: str = ""


class Read(NamedTuple):
    """A cleaned answer with its readings. unsupported: whether it has mathematics that our grammar does not read. unknown: whether it has
    an unknown command."""

    text: str
    readings: tuple[Reading, ...]
    unsupported: bool
    deep: bool
    unknown: bool = False

    def readable(self) -> bool:
        return self.unsupported or any(r.node is not None or r.letter for r in self.readings)


@lru_cache(maxsize=65536)
def simple_number(text: str) -> Fraction | None:
    """The value of a plain integer, finite decimal or fraction of integers; None for everything else."""
    if _INTEGER.fullmatch(text):
        return Fraction(int(text.replace(",", "")))
    if match := _DECIMAL.fullmatch(text):
        sign, whole, decimals = match.groups()
        value = Fraction(int(whole + decimals), 10 ** len(decimals))
        return -value if sign == "-" else value
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom = match[1], match[2] or match[4], match[3] or match[5]
        if int(bottom):
            value = Fraction(int(top), int(bottom))
            return -value if sign == "-" else value
    return None


def long_integer(text: str) -> str | None:
    """An integer of any size in one form, without converting it."""
    digits = text.lstrip("+-").replace(",", "")
    if not digits.isdecimal() or not digits.isascii() or len(text) - len(text.lstrip("+-")) > 1:
        return None
    return ("-" if text[0] == "-" else "") + (digits.lstrip("0") or "0")


@lru_cache(maxsize=65536)
def gold_answer(solution: str) -> str:
    """The answer in a solution: the content of its last box, or the whole text when it has no box."""
    box = last_box(solution)
    return (solution if box is None else box).strip()


@lru_cache(maxsize=16384)
def gold_reading(solution: str, depth: int = CHEAP_DEPTH) -> Read:
    return read(gold_answer(solution), depth)


def read(answer: str, depth: int = CHEAP_DEPTH) -> Read:
    """Never raises: what cannot be read has readings without a node."""
    if len(answer) > MAX_ANSWER:
        return Read(answer, (Reading(None, "", "too long"),), False, True)
    try:
        text = clean(answer)
    except LookAlike as error:
        return Read(answer, (Reading(None, "", str(error)),), False, False)
    if not text:
        return Read(text, (), False, False)
    labelled = choice(text)
    letter, rest = labelled if labelled else ("", text)
    found, unsupported, deep, unknown = [], False, False, False
    for reading in readings(rest) if rest else ():
        try:
            found.append(Reading(_node(reading, depth), letter, ""))
        except Unsupported as error:
            unsupported = True
            found.append(Reading(None, letter, str(error)))
        except Malformed as error:
            unknown |= isinstance(error, Unknown)
            found.append(Reading(_as_words(reading), letter, str(error)))
        except TooDeep as error:
            deep = True
            found.append(Reading(None, letter, str(error)))
    bare, domain = without_domain(rest) if "\\in" in rest else (rest, "")
    if domain:
        found += _bare_readings(bare, letter, domain, depth)
    if letter and not found:
        found.append(Reading(None, letter, ""))
    return Read(text, tuple(found), unsupported, deep, unknown)


def _bare_readings(text: str, letter: str, domain: str, depth: int) -> list[Reading]:
    """The answer without the domain of its parameter, which may be given or left out."""
    try:
        return [Reading(_node(text, depth), letter, "", domain)]
    except (Malformed, TooDeep):
        return []


def _node(text: str, depth: int) -> Node:
    node = special(text)
    return parse(text, depth) if node is None else node


def _as_words(text: str) -> Node | None:
    """Prose that is no formula (`Player 2 wins`) is compared as words."""
    if (
        len(text) > 300
        or not re.search(r"(?<![\\A-Za-z])[^\W\d_]{3,}", text)
        or re.search(r"\\(?!text|mathrm|textbf|%|\$)[A-Za-z]|[\^_=<>+*]", text)
    ):
        return None
    try:
        return text_node(text)
    except Malformed:
        return None


def judge_cheap(answer: str, solutions: tuple[str, ...]) -> Decision | None:
    """Try the routes that work in this process; None when the answer needs the cage."""
    value = simple_number(answer)
    if value is not None:
        golds = [simple_number(gold_answer(s)) for s in solutions]
        if value in golds:
            return Decision("right", "number", _against(answer, solutions))
        numbers = [gold for gold in golds if gold is not None]
        if len(numbers) == len(golds):
            return _numbers(answer, value, solutions, numbers)
    if len(answer) > 400 and (digits := long_integer(answer)):
        integers = [long_integer(gold_answer(s)) for s in solutions]
        if digits in integers or None not in integers:
            return Decision("right" if digits in integers else "wrong", "number")
    got = read(answer)
    if not got.text:
        return Decision("wrong", "empty", "an empty box")
    wants = [gold_reading(s) for s in solutions]
    if any(_same_text(got.text, w.text) for w in wants):
        return Decision("right", "string", _forms(got, *wants))
    if any(w.unsupported or w.deep for w in (got, *wants)) and not (len(answer) > MAX_ANSWER):
        return None
    return _decide(got, wants, RationalJudge())


def judge_caged(answer: str, solutions: tuple[str, ...]) -> Decision:
    """Try every route; only for a process that may be killed."""
    got = read(answer, CAGE_DEPTH)
    wants = [gold_reading(s, CAGE_DEPTH) for s in solutions]
    decision = _decide(got, wants, NumericJudge())
    if decision is None or decision.status == "right":
        return decision or Decision("undecided", "limit")
    if got.readable() and (got.unsupported or any(w.unsupported for w in wants)):
        return _ask_math_verify(got, wants, decision)
    return decision


def _numbers(answer: str, value: Fraction, solutions: tuple[str, ...], golds: list[Fraction]) -> Decision:
    """Plain numbers that differ: wrong, unless one is the other rounded to enough digits (0.333333 for 1/3)."""
    for solution, gold in zip(solutions, golds):
        for decimal, rounded, exact in ((answer, value, gold), (gold_answer(solution), gold, value)):
            digits = decimal.replace(".", "").lstrip("+-0")
            if (
                "." in decimal
                and len(digits) >= APPROXIMATE_DIGITS
                and rounds_exactly(exact, rounded, len(decimal) - decimal.index(".") - 1)
            ):
                return Decision("right", "number", _against(answer, solutions))
    return Decision("wrong", "number", _against(answer, solutions))


def _against(answer: str, solutions: tuple[str, ...]) -> str:
    return f"{answer.strip()[:200]} against {' | '.join(gold_answer(s)[:200] for s in solutions)}"


def _forms(got: Read, *wants: Read) -> str:
    """The normal forms that were compared."""
    return f"{got.text[:200]} against {' | '.join(w.text[:200] for w in wants)}"


def _same_text(a: str, b: str) -> bool:
    return a == b or (a.replace(" ", "") == b.replace(" ", "") and not re.search(r"\d \d", a + "|" + b))


def _decide(got: Read, wants: list[Read], judge: Judge) -> Decision | None:
    """None when a pair that could still be right needs the cage."""
    route = "structure" if isinstance(judge, RationalJudge) else "numeric"
    needs_cage, limit = False, ""
    for want in wants:
        for gold, answer in _pairs(got, want):
            if gold.letter and answer.letter:
                if gold.letter == answer.letter:
                    return Decision("right", "choice", _forms(got, want))
                continue
            if gold.node is None or answer.node is None:
                continue
            try:
                if equal(gold.node, answer.node, judge):
                    return Decision("right", route, _forms(got, want))
            except NeedsCage:
                needs_cage = True
            except (TooBig, TooDeep) as error:
                limit = str(error)
            except (Malformed, NoValue):
                continue
    if needs_cage:
        return None
    if limit or got.deep or all(w.deep for w in wants):
        return Decision("undecided", "limit", limit or (got.readings[0].fault if got.readings else "") or "too long")
    if all(r.node is None and not r.letter for w in wants for r in w.readings):
        return Decision("undecided", "gold_unreadable", wants[0].readings[0].fault if wants[0].readings else "an empty gold")
    if got.unknown and not got.readable():
        return Decision("undecided", "unreadable", got.readings[0].fault)
    faults = [r.fault for r in got.readings if r.fault and r.node is None]
    return Decision("wrong", "malformed", faults[0]) if faults else Decision("wrong", route, _forms(got, *wants))


def _pairs(got: Read, want: Read) -> Iterator[tuple[Reading, Reading]]:
    for gold in want.readings:
        for answer in got.readings:
            if gold.domain and answer.domain and gold.domain != answer.domain:
                continue  # both give one
            yield _with_letters(gold, answer)


def _with_letters(gold: Reading, answer: Reading) -> tuple[Reading, Reading]:
    """A lone letter is a choice when the other side is labelled; a label before an answer with its own text may be dropped."""
    for one, other in ((gold, answer), (answer, gold)):
        if one.letter and not other.letter:
            if other.node is not None and (other.node.op == "sym" or other.node == Node("const", (), "e")) and len(other.node.value) == 1:
                lettered = Reading(None, other.node.value.upper(), "")
                return (one, lettered) if one is gold else (lettered, one)
    if not gold.letter and not answer.letter and gold.node is not None and answer.node is not None:
        names = [n.value for n in (gold.node, answer.node) if n.op in ("sym", "const") and len(n.value) == 1]
        if len(names) == 2 and names[0] != names[1] and names[0].upper() == names[1].upper() <= "J":
            return Reading(None, names[0].upper(), ""), Reading(None, names[0].upper(), "")
    return gold, answer


def warm_up() -> None:
    """Load what the cage needs, and run each of it once."""
    judge_caged("\\sqrt{8}", ("2\\sqrt{2}",))
    judge_caged("\\int_0^1 x dx", ("\\frac{1}{2}",))


def near_texts(text: str) -> list[str]:
    """The text with its first, a middle and its last digit changed, and with its last letter."""
    places = [m.start() for m in re.finditer("[0-9]", text)]
    chosen = {places[0], places[len(places) // 2], places[-1]} if places else set()
    near = [text[:i] + ("7" if text[i] != "7" else "3") + text[i + 1 :] for i in sorted(chosen)]
    letters = [m.start() for m in re.finditer(r"(?<![\\A-Za-z])[a-z](?![A-Za-z])", text)]
    return near + [text[: letters[-1]] + ("w" if text[letters[-1]] != "w" else "v") + text[letters[-1] + 1 :]] if letters else near


def values_of(text: str) -> list[str]:
    """The sides of a chain of equal values (besides names) where there are several: math-verify reads the last alone."""
    depth, sides = 0, [""]
    for c in text:
        depth += (c in "{(") - (c in "})")
        if c == "=" and depth == 0:
            sides.append("")
        else:
            sides[-1] += c
    values = [s for s in sides if not re.fullmatch(r"\s*(?:[A-Za-z]|[A-Za-z]\([A-Za-z]\))\s*", s)]
    return values if len(values) > 1 else []


def _words(text: str) -> set[str]:
    """Words of prose; math-verify drops them, so an answer must not say more than the gold."""
    return set(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)) - {"dx", "dy", "dt", "dz"}


def _ask_math_verify(got: Read, wants: list[Read], decision: Decision) -> Decision:
    """math-verify alone is too lenient; it is asked only where our grammar ends, and must read both sides."""
    from math_verify import parse as mv_parse
    from math_verify import verify as mv_verify

    def read_by_it(text: str) -> list:
        return mv_parse(f"\\boxed{{{text}}}", parsing_timeout=None)

    answer, sides = read_by_it(got.text), [read_by_it(side) for side in values_of(got.text)]
    if len(answer) < 2 or any(len(side) < 2 for side in sides):  # only its own text came back
        return Decision("undecided", "unreadable", got.readings[0].fault if got.readings else "")
    golds_read = True
    for want in wants:
        if not (want.unsupported or got.unsupported and want.readable()) or _words(got.text) - _words(want.text):
            continue
        gold = read_by_it(want.text)
        golds_read &= len(gold) >= 2
        if len(gold) >= 2 and all(mv_verify(gold, side, timeout_seconds=None) for side in [answer, *sides]):
            for text, other in ((got.text, gold), (want.text, answer)):
                for near in near_texts(text):  # does it read what it accepts?
                    if mv_verify(read_by_it(near), other, timeout_seconds=None):
                        return Decision("undecided", "unreadable", "math-verify accepts other numbers as well")
            return Decision("right", "math-verify", _forms(got, want))
    return Decision("wrong", "math-verify", _forms(got, *wants)) if golds_read and decision.route != "limit" else decision
