"""Sets of real numbers as sorted, disjoint intervals, so that `x < 1 or x > 2`, `(-oo, 1) \\cup (2, oo)` and `R \\ [1, 2]` are equal."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from rlinf.rewards.math.canon import canonical, heading
from rlinf.rewards.math.forms import Malformed, Node, TooDeep, symbols

Number = Fraction | float  # float only for the infinities
INF = float("inf")
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
MAX_SPANS = 100
_SET_OPS = ("union", "intersection", "minus")


class Span(NamedTuple):
    low: Number
    low_closed: bool
    high: Number
    high_closed: bool


Region = tuple[Span, ...]
EVERYTHING: Region = (Span(-INF, False, INF, False),)


def is_region(node: Node) -> bool:
    """Whether this can only be a set of reals: never true of `(1, 2)`, which may be a point."""
    if node.op in ("reals", "member") or node.op in _SET_OPS:
        return True
    if node.op == "tuple" and len(node.args) == 2:
        return (
            node.value != "()"
            and not (node.value == "[]" and any(a.op == "tuple" for a in node.args))
            or any(_infinite(a) for a in node.args)
        )
    if node.op == "rel":
        return _variable(node) is not None
    if node.op == "list":
        return bool(node.args) and all(is_region(a) for a in node.args) and any(a.op == "rel" for a in node.args)
    return False


def variable_of(node: Node) -> str:
    """The name of the variable, when the region is written with one."""
    if node.op == "rel":
        found = _variable(node)
        return found[0] if found else ""
    if node.op == "member":
        return node.value
    names = {variable_of(a) for a in node.args} - {""} if node.op == "list" else set()
    if len(names) > 1:
        raise Malformed("conditions on several variables")
    return names.pop() if names else ""


def parameters(node: Node) -> frozenset[str]:
    """The free symbols besides the variable itself."""
    if node.op == "rel" and (found := _variable(node)):
        return frozenset().union(*(symbols(s) for i, s in enumerate(node.args) if i != found[1]))
    if node.op == "list":
        return frozenset().union(*(parameters(a) for a in node.args))
    return symbols(node) - {node.value} if node.op == "member" else symbols(node)


def region(node: Node, number: Callable[[Node], Number]) -> Region:
    """Raises Malformed for what is no set of reals. `number` gives the value of an end point."""
    if node.op == "reals":
        return EVERYTHING
    if node.op == "member":
        return region(node.args[0], number)
    if node.op == "set":
        return _united([Span(p, True, p, True) for p in map(number, node.args)])
    if node.op == "tuple" and len(node.args) == 2:
        return _interval(number(node.args[0]), node.value[0] == "[", number(node.args[1]), node.value[1] == "]")
    if node.op in _SET_OPS:
        left, right = (region(canonical(a), number) for a in node.args)
        if node.op == "union":
            return _united([*left, *right])
        return _meet(left, right if node.op == "intersection" else _complement(right))
    if node.op == "rel":
        return _of_relation(node, number)
    if node.op == "list":
        parts = [region(a, number) for a in node.args]
        if node.value == "and" or (node.value == "," and not _disjoint(parts)):
            whole = EVERYTHING
            for part in parts:
                whole = _meet(whole, part)
            return whole
        return _united([span for part in parts for span in part])
    raise Malformed(f"{node.op} is no set of numbers")


def _infinite(node: Node) -> bool:
    return node.op == "const" and node.value == "inf" or (node.op == "neg" and _infinite(node.args[0]))


def _variable(node: Node) -> tuple[str, int] | None:
    """(name, position) of the one side that is a name, in `x < 3`, `0 <= x < 1`, `x != 2`; None when it is not solved for a name."""
    sides, operators = node.args, node.value
    named = [(name, i) for i, s in enumerate(sides) if s.op in ("sym", "mul") and (name := heading(s)) is not None]
    if len(named) != 1 or len(sides) > 3 or (len(sides) == 3 and named[0][1] != 1):
        return None
    if any(o not in FLIPPED for o in operators) or (len(sides) == 3 and "!=" in operators) or all(o == "=" for o in operators):
        return None
    name, at = named[0]
    others = [s for i, s in enumerate(sides) if i != at]
    if any(_mentions(s, name) for s in others) or any(s.op not in _NUMBERS for s in others):
        return None
    return name, at


_NUMBERS = ("num", "dec", "neg", "add", "mul", "div", "pow", "fn", "const", "percent", "quantity", "degree")


def _mentions(node: Node, name: str) -> bool:
    return node.op == "sym" and node.value == name or any(_mentions(a, name) for a in node.args)


def _of_relation(node: Node, number: Callable[[Node], Number]) -> Region:
    found = _variable(node)
    if found is None:
        raise Malformed("an inequality that is not solved")
    at = found[1]
    whole = EVERYTHING
    for i, operator in enumerate(node.value):
        bound = number(node.args[i + 1] if i + 1 != at else node.args[i])
        direction = operator if i == at else FLIPPED[operator]
        whole = _meet(whole, _half_line(direction, bound))
    return whole


def _half_line(operator: str, bound: Number) -> Region:
    if operator == "!=":
        return (Span(-INF, False, bound, False), Span(bound, False, INF, False))
    if operator in ("<", "<="):
        return (Span(-INF, False, bound, operator == "<=" and bound != INF),)
    if operator in (">", ">="):
        return (Span(bound, operator == ">=" and bound != -INF, INF, False),)
    return (Span(bound, True, bound, True),)


def _interval(low: Number, low_closed: bool, high: Number, high_closed: bool) -> Region:
    span = Span(low, low_closed, high, high_closed)
    if _empty(span) or (low_closed and low == -INF) or (high_closed and high == INF):
        raise Malformed("no interval")
    return (span,)


def _empty(span: Span) -> bool:
    return span.low > span.high or (span.low == span.high and not (span.low_closed and span.high_closed))


def _united(spans: list[Span]) -> Region:
    if len(spans) > MAX_SPANS:
        raise TooDeep("too many intervals")
    merged: list[Span] = []
    for span in sorted((s for s in spans if not _empty(s)), key=lambda s: (s.low, not s.low_closed)):
        last = merged[-1] if merged else None
        if last and (span.low < last.high or (span.low == last.high and (span.low_closed or last.high_closed))):
            if (span.high, span.high_closed) > (last.high, last.high_closed):
                merged[-1] = last._replace(high=span.high, high_closed=span.high_closed)
        else:
            merged.append(span)
    return tuple(merged)


def _meet(a: Region, b: Region) -> Region:
    spans = []
    for s in a:
        for t in b:
            low, low_open = max((s.low, not s.low_closed), (t.low, not t.low_closed))
            high, high_closed = min((s.high, s.high_closed), (t.high, t.high_closed))
            spans.append(Span(low, not low_open, high, high_closed))
    return _united(spans)


def _complement(a: Region) -> Region:
    spans: list[Span] = []
    low: Number = -INF
    low_closed = False
    for span in a:
        spans.append(Span(low, low_closed, span.low, not span.low_closed and span.low != -INF))
        low, low_closed = span.high, not span.high_closed and span.high != INF
    spans.append(Span(low, low_closed, INF, False))
    return _united([s for s in spans if not (s.low == s.high and abs(s.low) == INF)])


def _disjoint(parts: list[Region]) -> bool:
    total = [span for part in parts for span in part]
    if len(total) > MAX_SPANS:
        raise TooDeep("too many intervals")
    return all(not _meet((s,), (t,)) for i, s in enumerate(total) for t in total[:i])
