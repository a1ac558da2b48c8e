r"""Detects a right answer that only repeats a formula of the question: \boxed{23+45} does not answer "What is 23+45?".

Answer and prompt are brought to one notation, so that brackets, a name in front, a unit at the end or another multiplication sign do not
hide a copy. An answer that is already a finished value (a number in lowest terms, an interval of such numbers, `x = 2`), or has the form of
the solution itself, is not a copy.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache

from rlinf.rewards.math.canon import heading
from rlinf.rewards.math.decide import MAX_ANSWER, gold_answer, read
from rlinf.rewards.math.forms import Node, symbols
from rlinf.rewards.math.normalise import LookAlike, clean
from rlinf.rewards.math.words import untext

_NO_FORMULA = re.compile(r"[-+]?[\w\s.,%]*")
_TEXT_GROUP = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}|\\\$")
_TRAILING_WORDS = re.compile(r"(?<=[0-9)}!|\]])\s*[A-Za-z][A-Za-z /]+(?:\^\{?[0-9]\}?)?$")
_SIGNS = [
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\[lr]vert(?![A-Za-z])"), "|"),
    (re.compile(r"\\sqrt\s*([0-9])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
]
_INNER_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_PRODUCT = re.compile(r"(?<=[0-9)])\(")
_VALUES = frozenset("num dec const sym text clock date range based reals".split())
_HOLDERS = frozenset("neg pm percent degree quantity tuple set list union intersection minus builder member matrix".split())


def copies_question(answer: str, solutions: tuple[str, ...], prompt: str) -> bool:
    """Whether the answer, which is right, is a formula of the prompt and neither finished nor the gold's own form."""
    if len(answer) > MAX_ANSWER or _NO_FORMULA.fullmatch(untext(answer)):  # so long and right: the gold itself or an integer
        return False
    golds, bare = [gold_answer(s) for s in solutions], "".join(answer.split())
    if any("".join(gold.split()) == bare for gold in golds):
        return False
    nodes = [reading.node for reading in read(answer).readings]
    forms = _forms(answer, any(node is not None and node.op == "quantity" for node in nodes))
    if not any(_stands_in(form, _prompt_notation(prompt)) for form in forms):
        return False
    if any(form in forms for gold in golds for form in _forms(gold, False)):
        return False
    own = {_ordered(r.node) for gold in golds for r in read(gold).readings if r.node is not None}
    return not any(node is not None and (finished(node) or _ordered(node) in own) for node in nodes)


def finished(node: Node) -> bool:
    """Nothing is left to work out: numbers in lowest terms, names and words, and what only holds them together."""
    if node.op in _VALUES:
        return True
    if node.op == "ratio":
        if node.args:
            return all(finished(a) for a in node.args)
        return all(x.denominator == 1 for x in node.value) and math.gcd(*(int(x) for x in node.value)) == 1
    if node.op == "add" and len(node.args) == 2:  # 3+4i
        return sorted(part[1] for a in node.args if (part := _multiple(a)) is not None) == ["", "i"]
    if node.op in ("mul", "div"):
        return _multiple(node) is not None
    if node.op == "rel":
        sides = [side for side in node.args if heading(side) is None]
        if set(node.value) == {"="} and not any(symbols(side) for side in sides):
            return not sides or any(finished(side) for side in sides)  # 23+45=68 gives the value
        return all(finished(side) for side in sides)
    return node.op in _HOLDERS and all(finished(a) for a in node.args)


def _multiple(node: Node) -> tuple[Fraction, str] | None:
    r"""(factor, constant) of a number in lowest terms or of its multiple of a constant: 3, \frac{1}{2}, 2\pi, \frac{3\pi}{4}, -i."""
    if node.op == "neg":
        inner = _multiple(node.args[0])
        return inner and (-inner[0], inner[1])
    if node.op in ("num", "dec"):
        return (node.value if node.op == "num" else node.value[0]), ""
    if node.op == "const" and node.value != "inf":
        return Fraction(1), node.value
    if node.op not in ("mul", "div") or len(node.args) != 2:
        return None
    left, right = _multiple(node.args[0]), _multiple(node.args[1])
    if left is None or right is None:
        return None
    (x, name), (y, other) = left, right
    if node.op == "mul":  # 6\cdot 7 is still to be worked out
        return None if bool(name) == bool(other) else (x * y, name + other)
    lowest = x.denominator == y.denominator == 1 and y > 1 and math.gcd(int(x), int(y)) == 1
    return (x / y, name) if lowest and not other else None


def _ordered(node: Node) -> Node:
    """With the terms of sums and products in one order."""
    args = tuple(_ordered(a) for a in node.args)
    return node._replace(args=tuple(sorted(args, key=repr)) if node.op in ("add", "mul") else args)


def _forms(answer: str, unit: bool) -> set[str]:
    """The answer in one notation, and without a name in front and a unit behind."""
    cleaned = _cleaned(answer)
    texts = [cleaned, _TRAILING_WORDS.sub("", _TEXT_GROUP.sub("", cleaned).strip())] if unit else [cleaned]
    forms = {_notation(text).lstrip("+=") for text in texts}
    return {form for form in forms | {form.rpartition("=")[2].lstrip("+") for form in forms} if form}


def _cleaned(text: str) -> str:
    try:
        return clean(text)
    except LookAlike:
        return text


@lru_cache(maxsize=256)  # the answers of a group share it
def _prompt_notation(prompt: str) -> str:
    return _notation(_cleaned(prompt))


def _notation(text: str) -> str:
    text = untext(text)
    for pattern, sign in _SIGNS:
        text = pattern.sub(sign, text)
    for _ in range(6):  # from the inside out
        text, count = _INNER_FRACTION.subn(r"\1/\2", text)
        if not count:
            break
    text = _PRODUCT.sub("*", "".join(text.split()))
    return re.sub(r"[(){}$]", "", text)


def _stands_in(form: str, prompt: str) -> bool:
    at = prompt.find(form)
    while at >= 0:  # as a whole: 1/2 is not a copy from 11/23
        before, after = prompt[at - 1 : at], prompt[at + len(form) : at + len(form) + 1]
        if not (before.isdigit() and form[0].isdigit()) and not (after.isdigit() and form[-1].isdigit()):
            return True
        at = prompt.find(form, at + 1)
    return False
