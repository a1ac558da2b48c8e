"""Decides whether two parsed answers mean the same. The structure is compared here; expressions are given to a `Judge`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

from rlinf.rewards.math.canon import canonical, is_simple_name, items_of
from rlinf.rewards.math.evaluate import exact
from rlinf.rewards.math.forms import Node, TooDeep, symbols
from rlinf.rewards.math.regions import Number, is_region, parameters, region, variable_of
from rlinf.rewards.math.units import Unit, comparable

APPROXIMATE_DIGITS = 6  # significant digits from which a rounded decimal may stand for a value that has no finite decimal form
MAX_PAIRS = 2500  # comparisons to match two unordered collections whose members are not plain numbers


class Judge(Protocol):
    """Compares expressions. There are two: one that knows only rationals and works in this process, and one with mpmath for the cage."""

    def same(self, a: Node, b: Node) -> bool:
        """Whether two expressions are identically equal."""
        ...

    def number(self, node: Node) -> Number:
        """The real value of an end point of an interval."""
        ...

    def same_relation(self, a: Node, b: Node) -> bool:
        """Whether two equations or inequalities have the same solutions."""
        ...

    def rounds_to(self, node: Node, decimal: Node, cut: bool) -> bool:
        """Whether the decimal is the value of the expression, rounded (or cut, where that counts) at its last digit."""
        ...

    def is_finite_decimal(self, node: Node) -> bool:
        """Whether the value can be written out as a decimal; such a value must be given exactly."""
        ...


def equal(gold: Node, answer: Node, judge: Judge) -> bool:
    """Whether the two answers mean the same. Raises Malformed or NoValue when a side has no meaning, and whatever the judge raises."""
    return _equal(canonical(gold), canonical(answer), judge)


def _equal(g: Node, a: Node, judge: Judge) -> bool:
    if g == a and not (g.op == "assign" and _inconsistent(g, judge)):
        return True
    if g.op == a.op == "rel" and all(parameters(x) for x in (g, a)):  # neither is solved with a number
        return judge.same_relation(g, a)
    if is_region(g) or is_region(a):
        return _same_region(g, a, judge)
    for one, other in ((g, a), (a, g)):
        if one.op == "assign" and "=" in one.value and other.op in ("list", "tuple"):  # x = y = 1 is (1, 1), and x = 1, y = 1
            parts = _one_by_one(one)
            return not _inconsistent(one, judge) and _same_collection(*((parts, a) if one is g else (g, parts)), judge)
    if "list" in (g.op, a.op) or "set" in (g.op, a.op):
        return _same_collection(g, a, judge)
    if "assign" in (g.op, a.op):
        return _same_assignment(g, a, judge)
    if "mod" in (g.op, a.op):
        return _same_residue(g, a, judge)
    if "rel" in (g.op, a.op):
        return g.op == a.op and judge.same_relation(g, a)
    if g.op in ("tuple", "matrix") or a.op in ("tuple", "matrix"):
        return _same_vector(g, a, judge)
    special = _SPECIAL.get(g.op) or _SPECIAL.get(a.op)
    if special is not None:
        return special(g, a, judge)
    return _same_scalar(g, a, judge)


def _one_by_one(node: Node) -> Node:
    """`x = y = 1` as `x = 1, y = 1`."""
    names = [Node("sym", (), name) for name in node.value.split("=")]
    return Node("list", tuple(Node("assign", (node.args[0], name), name.value) for name in names), "and")


# -- collections


def _same_region(g: Node, a: Node, judge: Judge) -> bool:
    names = {variable_of(g), variable_of(a)} - {""}
    if len(names) > 1:
        return False
    for node in (g, a):
        if not is_region(node) and node.op not in ("tuple", "set", "list"):
            return False
        if node.op == "tuple" and (len(node.args) != 2 or node.value != "()") and not is_region(node):
            return False
        if node.op == "list" and not is_region(node):
            return False
    if any(parameters(x) for x in (g, a)):
        return _same_symbolic_region(g, a, judge)
    return region(g, judge.number) == region(a, judge.number)


def _same_symbolic_region(g: Node, a: Node, judge: Judge) -> bool:
    """End points with parameters cannot be put in order: interval against interval, union against union in any order."""
    g, a = (x.args[0] if x.op == "member" else x for x in (g, a))
    if g.op == a.op == "union":
        left, right = _pieces(g), _pieces(a)
        return len(left) == len(right) and _match(left, right, lambda x, y: _same_symbolic_region(x, y, judge))
    if g.op == a.op == "tuple":
        return g.value == a.value and len(g.args) == len(a.args) and all(_end_point(x, y, judge) for x, y in zip(g.args, a.args))
    if g.op == a.op == "rel":
        return judge.same_relation(g, a)
    return False


def _end_point(x: Node, y: Node, judge: Judge) -> bool:
    return x == y or (not {"inf"} & {x.value, y.value} and judge.same(x, y))


def _pieces(node: Node) -> list[Node]:
    return [p for a in node.args for p in _pieces(a)] if node.op == "union" else [canonical(node)]


def _same_collection(g: Node, a: Node, judge: Judge) -> bool:
    """Lists and sets hold the same members in any order; a list counts repetitions, a set does not. A bare list may also be a tuple."""
    for one, other in ((g, a), (a, g)):
        if one.op == "list" and _assigned_tuple(one, other, judge):
            return True
        if one.op == "list" and other.op == "tuple":
            bare = one.value == "," and not any(i.op in ("assign", "rel") for i in one.args)
            return (
                bare
                and other.value == "()"
                and len(one.args) == len(other.args)
                and all(_equal(x, y, judge) for x, y in zip(g.args, a.args))
            )
    for x in (g, a):
        if x.op not in ("list", "set") and "list" not in (g.op, a.op):  # {5} and 5: a set with one member stands for it
            return len(items_of(g)) == len(items_of(a)) == 1 and _equal(items_of(g)[0], items_of(a)[0], judge)
    left, right = list(items_of(g)), list(items_of(a))
    if "set" in (g.op, a.op):
        left, right = _distinct(left, judge), _distinct(right, judge)
    if len(left) != len(right):
        return False
    values = _exact_values(left), _exact_values(right)
    if values[0] is not None and values[1] is not None:
        return Counter(values[0]) == Counter(values[1])
    return _match(left, right, lambda x, y: _equal(x, y, judge))


def _exact_values(nodes: list[Node]) -> list[Fraction] | None:
    if any(n.op in ("percent", "quantity") or (n.op == "dec" and n.value[2] >= APPROXIMATE_DIGITS) for n in nodes):
        return None
    values = [v for n in nodes if (v := exact(n)) is not None]
    return values if len(values) == len(nodes) else None


def _distinct(nodes: list[Node], judge: Judge) -> list[Node]:
    values = _exact_values(nodes)
    if values is not None:
        first: dict[Fraction, Node] = {}
        for value, node in zip(values, nodes):
            first.setdefault(value, node)
        return list(first.values())
    kept: list[Node] = []
    if len(nodes) ** 2 > 2 * MAX_PAIRS:
        raise TooDeep("too many members")
    for node in nodes:
        if not any(_equal(k, node, judge) for k in kept):
            kept.append(node)
    return kept


def _match(left: Sequence[Node], right: Sequence[Node], same: Callable[[Node, Node], bool]) -> bool:
    """Whether every member of one side has its own partner on the other. A greedy search is enough, because the relation is an
    equivalence."""
    if len(left) * len(right) > MAX_PAIRS:
        raise TooDeep("too many members")
    rest = list(right)
    for x in left:
        partner = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if partner is None:
            return False
        del rest[partner]
    return True


def _assigned_tuple(one: Node, other: Node, judge: Judge) -> bool:
    """`x = 1, y = 2` is `(x, y) = (1, 2)`, and `(1, 2)` with the names in alphabetical order."""
    if not all(i.op == "assign" and i.args[1].op == "sym" for i in one.args):
        return False
    given = {i.value: i.args[0] for i in one.args}
    names, values = sorted(given), other
    if other.op == "assign" and other.args[1].op == "tuple":
        names, values = [n.value for n in other.args[1].args], other.args[0]
    if (
        values.op != "tuple"
        or values.value != "()"
        or len(given) != len(one.args)
        or set(names) != set(given)
        or len(values.args) != len(names)
    ):
        return False
    return all(_equal(given[n], v, judge) for n, v in zip(names, values.args))


# -- relations


def _inconsistent(node: Node, judge: Judge) -> bool:
    """`x = 3 = 4`, `2 + 2 = 5`, `42.9 ~ 42` and `5/2 ~ 3 ~ 2` assert nothing."""
    value = node.args[0]
    sides = node.args[1 if node.value == "" else 2 :]
    if sum(side.op == "approx" for side in sides) > 1:
        return True
    for side in sides:
        if side.op == "approx":
            decimal = _untagged(side.args[0])[0]
            if _unsigned(decimal).op not in ("dec", "num") or not judge.rounds_to(_untagged(value)[0], decimal, cut=False):
                return True
        elif not _equal(side, value, judge):
            return True
    return False


def _unsigned(node: Node) -> Node:
    return node.args[0] if node.op == "neg" else node


def _same_assignment(g: Node, a: Node, judge: Judge) -> bool:
    if any(x.op == "assign" and _inconsistent(x, judge) for x in (g, a)):
        return False
    for one, other in ((g, a), (a, g)):  # 2\sqrt{3} ~ 3.46 also says 3.46
        for side in (s.args[0] for s in one.args if s.op == "approx") if one.op == "assign" else ():
            if one is a and _coarse(side, a.args[0]):
                continue
            if _equal(side, other.args[0] if other.op == "assign" else other, judge):
                return True
    if g.op == a.op:
        if _compatible_names(g.value, a.value) and _equal(g.args[0], a.args[0], judge):
            return True
        solved = any(is_simple_name(x.args[1]) and not symbols(x.args[0]) for x in (g, a))
        return not solved and judge.same_relation(_as_relation(g), _as_relation(a))
    assign, other = (g, a) if g.op == "assign" else (a, g)
    if other.op == "rel":  # an equation against one that is solved: 2x - y + 1 = 0 for y = 2x + 1, but never 2x = 10 for x = 5
        solved = is_simple_name(assign.args[1]) and not symbols(assign.args[0])
        return not solved and judge.same_relation(_as_relation(g), _as_relation(a))
    if not is_simple_name(assign.args[1]) and assign is g and assign.value:
        return False  # the gold is an equation such as x + y = 5, not a value with a name
    return _equal(g.args[0] if g is assign else g, a.args[0] if a is assign else a, judge)


def _coarse(approximation: Node, value: Node) -> bool:
    """An answer that gives an exact fraction does not also give the whole number beside it."""
    exactly = exact(_untagged(value)[0])
    return _unsigned(_untagged(approximation)[0]).op == "num" and exactly is not None and exactly.denominator != 1


def _as_relation(node: Node) -> Node:
    return Node("rel", (node.args[1], node.args[0]), ("=",)) if node.op == "assign" else node


def _compatible_names(g: str, a: str) -> bool:
    """The same name; or one that is only words; or two unknowns of which one is written as a function: y and f(x)."""
    if g == a or not g or not a or g.startswith("text ") or a.startswith("text "):
        return True
    if "=" in g or "=" in a:  # x = y = 5
        return set(g.split("=")) <= set(a.split("="))
    base = [n.split("_")[0].rstrip("'") for n in (g, a)]
    if base[0] == base[1]:
        return "_" not in g or "_" not in a
    return sorted(n[:1] for n in base if len(n) == 2 or n == "y") in (["f", "y"], ["g", "y"], ["h", "y"])


def _same_residue(g: Node, a: Node, judge: Judge) -> bool:
    if g.op == a.op:
        n, m = exact(g.args[1]), exact(a.args[1])
        x, y = exact(g.args[0]), exact(a.args[0])
        if n is None or m is None or x is None or y is None:
            return judge.same(g.args[1], a.args[1]) and judge.same(g.args[0], a.args[0])
        return n == m != 0 and ((x - y) / n).denominator == 1
    return _equal(g.args[0] if g.op == "mod" else g, a.args[0] if a.op == "mod" else a, judge)


# -- tuples and matrices


def _same_vector(g: Node, a: Node, judge: Judge) -> bool:
    g, a = _as_matrix(g), _as_matrix(a)
    if g.op == "matrix" and a.op == "tuple":
        g, a = a, g
    if g.op == "tuple" and a.op == "matrix":  # a row or a column for a vector
        entries = a.args[0].args if len(a.args) == 1 else tuple(r.args[0] for r in a.args if len(r.args) == 1)
        if len(a.args) > 1 and len(entries) != len(a.args) or not _brackets_agree(g.value, "()", len(g.args)):
            return False
        return len(g.args) == len(entries) and all(_equal(x, y, judge) for x, y in zip(g.args, entries))
    if g.op != a.op or len(g.args) != len(a.args) or (g.op == "tuple" and not _brackets_agree(g.value, a.value, len(g.args))):
        return False
    return all(_equal(x, y, judge) for x, y in zip(g.args, a.args))


def _as_matrix(node: Node) -> Node:
    """[[1, 2], [3, 4]] is a matrix."""
    if (
        node.op == "tuple"
        and node.value == "[]"
        and all(r.op == "tuple" and r.value == "[]" for r in node.args)
        and len({len(r.args) for r in node.args}) == 1
    ):
        return Node("matrix", tuple(r._replace(value="()") for r in node.args))
    return node


def _brackets_agree(g: str, a: str, length: int) -> bool:
    return g == a or (length > 2 and {g, a} == {"()", "[]"})  # with two members, the bracket says open or closed


# -- numbers and words


def _same_scalar(g: Node, a: Node, judge: Judge) -> bool:
    gold, gold_tag = _untagged(g)
    answer, answer_tag = _untagged(a)
    if isinstance(gold_tag, Unit) and isinstance(answer_tag, Unit):
        if not comparable(gold_tag, answer_tag):
            return False
        return (
            _same_value(gold, answer, judge)
            if gold_tag.scale == answer_tag.scale
            else _same_value(_times(gold, gold_tag.scale), _times(answer, answer_tag.scale), judge)
        )
    if isinstance(gold_tag, Unit) or isinstance(answer_tag, Unit):
        tags = {t if isinstance(t, str) else t and t.dimension[:1] and t.dimension[0][0] for t in (gold_tag, answer_tag)}
        agree = "percent" not in tags and ("degree" not in tags or bool(tags & {"celsius", "fahrenheit"}))
        return agree and _same_value(gold, answer, judge)
    if gold_tag == answer_tag:
        return _same_value(gold, answer, judge) or (gold_tag is None and _same_but_for_degrees(gold, answer, judge))
    if "percent" in (gold_tag, answer_tag):
        if "degree" in (gold_tag, answer_tag):
            return False
        return _same_percent(gold, gold_tag == "percent", answer, answer_tag == "percent", judge)
    turned = Node("degree", (gold if gold_tag else answer,))
    return _same_value(gold, answer, judge) or (
        bool(symbols(turned) or _has_pi(answer if gold_tag else gold)) and judge.same(turned, answer if gold_tag else gold)
    )


def _same_but_for_degrees(gold: Node, answer: Node, judge: Judge) -> bool:
    """90 - a/2 for 90° - a/2: the sign may be left out of all numbers of a side, but not inside a function."""
    bare = [_without_degrees(x) for x in (gold, answer)]
    one_side = (bare[0] == gold) is not (bare[1] == answer)
    return one_side and bool(symbols(gold) and symbols(answer)) and not any(map(_has_pi, bare)) and judge.same(*bare)


def _without_degrees(node: Node) -> Node:
    if node.op == "degree":
        return node.args[0]
    return node._replace(args=tuple(_without_degrees(a) for a in node.args)) if node.op in ("add", "neg", "mul", "div") else node


def _same_percent(gold: Node, gold_has: bool, answer: Node, answer_has: bool, judge: Judge) -> bool:
    """50 % is 0.5; and the sign may be left out (50), unless the number is 1 at most, where the two readings meet."""
    hundredth = Node("num", (), Fraction(1, 100))
    scaled = [Node("mul", (x, hundredth)) if has else x for x, has in ((gold, gold_has), (answer, answer_has))]
    if _same_value(scaled[0], scaled[1], judge):
        return True
    bare = exact(gold)
    return (bare is None or abs(bare) > 1) and _same_value(gold, answer, judge)


def _untagged(node: Node) -> tuple[Node, Unit | str | None]:
    if node.op == "quantity":
        return node.args[0], node.value
    return (node.args[0], node.op) if node.op in ("percent", "degree") else (node, None)


def _times(node: Node, factor: Fraction) -> Node:
    return Node("mul", (node, Node("num", (), factor)))


def _has_pi(node: Node) -> bool:
    return node == Node("const", (), "pi") or any(_has_pi(a) for a in node.args)


def _same_value(g: Node, a: Node, judge: Judge) -> bool:
    if _is_infinity(g) or _is_infinity(a):
        return _sign_of_infinity(g) == _sign_of_infinity(a) != 0
    for value, decimal in ((g, a), (a, g)):
        plain = decimal.args[0] if decimal.op == "neg" else decimal
        if (
            plain.op == "dec"
            and plain.value[2] >= APPROXIMATE_DIGITS
            and value.op != "dec"
            and not (value.op == "neg" and value.args[0].op == "dec")
        ):
            return judge.same(g, a) or (not judge.is_finite_decimal(value) and judge.rounds_to(value, decimal, cut=True))
    return judge.same(g, a)


def _is_infinity(node: Node) -> bool:
    return _sign_of_infinity(node) != 0


def _sign_of_infinity(node: Node) -> int:
    if node.op == "neg":
        return -_sign_of_infinity(node.args[0])
    return int(node.op == "const" and node.value == "inf")


def _same_text(g: Node, a: Node, _: Judge) -> bool:
    return g.op == a.op and g.value == a.value


def _same_based(g: Node, a: Node, judge: Judge) -> bool:
    """A number written in a base is the answer to a question about that base: the same digits in the same base."""
    if g.op == a.op:
        return g.value == a.value
    based, other = (g, a) if g.op == "based" else (a, g)
    return based.value[1] == 10 and _same_scalar(Node("num", (), Fraction(int(based.value[0]))), other, judge)


def _same_clock(g: Node, a: Node, judge: Judge) -> bool:
    if "ratio" in (g.op, a.op) or "range" in (g.op, a.op):
        return _same_ratio(_clock_as_ratio(g), _clock_as_ratio(a), judge)
    if g.op != a.op:
        return False
    (gh, gm, gs, g_half), (ah, am, as_, a_half) = g.value, a.value
    if (gm, gs) != (am, as_):
        return False
    if g_half == a_half or (a_half and gh >= 13) or (g_half and ah >= 13):
        return gh % 24 == ah % 24
    return a_half and gh % 12 == ah % 12  # the gold leaves the half of the day open


def _clock_as_ratio(node: Node) -> Node:
    h, m, s, half = node.value if node.op == "clock" else (0, 0, 1, True)
    return node if node.op != "clock" or half or s else Node("ratio", (), (Fraction(h), Fraction(m)))


def _same_date(g: Node, a: Node, _: Judge) -> bool:
    return g.op == a.op and g.value[1:] == a.value[1:] and g.value[0] in (None, a.value[0])


def _same_ratio(g: Node, a: Node, judge: Judge) -> bool:
    if "range" in (g.op, a.op):
        return _same_range(g, a, judge)
    if g.op == a.op == "ratio":
        left, right = _terms(g), _terms(a)
        return len(left) == len(right) and _proportional(left, right, judge)
    ratio, other = (g, a) if g.op == "ratio" else (a, g)
    terms = _terms(ratio)
    if other.op in _SPECIAL or len(terms) != 2 or exact(terms[1]) == 0:
        return False
    return judge.same(Node("div", terms), other)


def _terms(ratio: Node) -> tuple[Node, ...]:
    return ratio.args or tuple(Node("num", (), x) for x in ratio.value)


def _proportional(left: Sequence[Node], right: Sequence[Node], judge: Judge) -> bool:
    zero = Node("num", (), Fraction(0))
    zeros = [[judge.same(x, zero) for x in side] for side in (left, right)]
    if zeros[0] != zeros[1] or all(zeros[0]):
        return zeros[0] == zeros[1]
    at = zeros[0].index(False)
    return all(judge.same(Node("mul", (x, right[at])), Node("mul", (y, left[at]))) for x, y in zip(left, right))


def _same_range(g: Node, a: Node, judge: Judge) -> bool:
    """`3 to 2` is 3:2, but 5 to 7 is not 10 to 14."""
    if g.op == a.op:
        return g.value == a.value
    return {"ratio", "range"} == {g.op, a.op} and _same_ratio(g._replace(op="ratio"), a._replace(op="ratio"), judge)


_SPECIAL = {"range": _same_range, "text": _same_text, "clock": _same_clock, "date": _same_date, "ratio": _same_ratio, "based": _same_based}
