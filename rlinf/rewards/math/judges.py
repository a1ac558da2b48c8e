"""The two judges of expressions: rationals only, in any process; and mpmath, for the cage.

The numeric judge decides identities by evaluating both sides at fixed points with precision to spare: an identity agrees at every
point, and two different expressions of bounded size do not agree at several unrelated points to 60 digits (Schwartz 1980, Zippel 1979,
for polynomials). Exact rationals never come here.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from rlinf.rewards.math.evaluate import (
    CAGE_BITS,
    CHEAP_BITS,
    NoValue,
    Numeric,
    TooBig,
    exact,
)
from rlinf.rewards.math.forms import Node, symbols
from rlinf.rewards.math.regions import INF, Number

DIGITS = 60
MAX_DIGITS = 8_000
_TENTHS = (17, 29, 23, 31, 13, 37, 19, 41, 11, 43, 47, 7, 53, 59, 61, 67)  # no simple relation among them


class NeedsCage(Exception):
    """Raised for symbolic work, which must not be done in this process."""


def rounds_exactly(value: Fraction, decimal: Fraction, places: int) -> bool:
    """Whether the decimal with so many places is the value, rounded or cut there. A finite decimal value must be given exactly."""
    return not is_finite(value) and _is_rounded(value, decimal, places)


def is_finite(value: Fraction) -> bool:
    """Whether the value has a finite decimal form."""
    rest = value.denominator
    for p in (2, 5):
        while rest % p == 0:
            rest //= p
    return rest == 1


def _is_rounded(value: Fraction, decimal: Fraction, places: int, cut: bool = True) -> bool:
    ulp = Fraction(1, 10**places)
    return abs(value - decimal) <= ulp / 2 or cut and 0 <= abs(value) - abs(decimal) < ulp and value * decimal >= 0


def decimal_parts(node: Node) -> tuple[Fraction, int]:
    if node.op == "neg":
        value, places = decimal_parts(node.args[0])
        return -value, places
    return (node.value, 0) if node.op == "num" else (node.value[0], node.value[1])


class RationalJudge:
    def same(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        x, y = _exact(a), _exact(b)
        if x is None or y is None:
            raise NeedsCage
        return x == y

    def number(self, node: Node) -> Number:
        infinite = infinity(node)
        if infinite:
            return infinite
        value = _exact(node)
        if value is None:
            raise NeedsCage
        return value

    def same_relation(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        raise NeedsCage

    def rounds_to(self, node: Node, decimal: Node, cut: bool) -> bool:
        value = _exact(node)
        if value is None:
            raise NeedsCage
        return _is_rounded(value, *decimal_parts(decimal), cut)

    def is_finite_decimal(self, node: Node) -> bool:
        value = _exact(node)
        if value is None:
            raise NeedsCage
        return is_finite(value)


def _exact(node: Node) -> Fraction | None:
    try:
        return exact(node, CHEAP_BITS)
    except TooBig as error:
        raise NeedsCage from error


def infinity(node: Node) -> float:
    if node.op == "neg":
        return -infinity(node.args[0])
    return INF if node.op == "const" and node.value == "inf" else 0.0


class NumericJudge:
    """For the cage only: its work is bounded, but not small."""

    def __init__(self) -> None:
        from mpmath import mp

        self.mp = mp

    def same(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        x, y = exact(a, CAGE_BITS), exact(b, CAGE_BITS)
        if x is not None and y is not None:
            return x == y
        return self._identical(a, b, symbols(a) | symbols(b)) or self._identical_up_to_case(a, b)

    def number(self, node: Node) -> Number:
        infinite = infinity(node)
        if infinite:
            return infinite
        value = exact(node, CAGE_BITS)
        if value is not None:
            return value
        if symbols(node):
            raise NoValue("an end point with a symbol")
        with self.mp.workdps(DIGITS):
            x = Numeric(self.mp).value(node, {})
            if self.mp.im(x) != 0:
                raise NoValue("an end point that is not real")
            return Fraction(int(self.mp.nint(self.mp.re(x) * self.mp.mpf(10) ** 40)), 10**40)

    def rounds_to(self, node: Node, decimal: Node, cut: bool) -> bool:
        target, places = decimal_parts(decimal)
        value = exact(node, CAGE_BITS)
        if value is not None:
            return _is_rounded(value, target, places, cut)
        if symbols(node):
            return False
        with self.mp.workdps(DIGITS + places):
            x = Numeric(self.mp).value(node, {})
            if self.mp.im(x) != 0:
                return False
            scale = 10 ** (places + 30)
            return _is_rounded(Fraction(int(self.mp.nint(self.mp.re(x) * scale)), scale), target, places, cut)

    def is_finite_decimal(self, node: Node) -> bool:
        value = exact(node, CAGE_BITS)
        return value is not None and is_finite(value)

    def same_relation(self, a: Node, b: Node) -> bool:
        """lhs - rhs of one is a constant multiple of the other's; or one is solved for a name in which the other is linear."""
        if len(a.args) != 2 or len(b.args) != 2:
            return self._same_chain(a, b)
        f, g = (Node("add", (r.args[0], Node("neg", (r.args[1],)))) for r in (a, b))
        names = symbols(f) | symbols(g)
        if not symbols(f) or not symbols(g):
            return False
        ratio = self._constant_ratio(f, g, names)
        if a.value == b.value == ("=",):
            return ratio is not None or self._solves(a, g) or self._solves(b, f)
        if ratio is None or self.mp.im(ratio) != 0:
            return False
        flipped = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(b.value[0], b.value[0])
        return a.value[0] == (b.value[0] if ratio > 0 else flipped)

    def _same_chain(self, a: Node, b: Node) -> bool:
        if len(a.args) != len(b.args):
            return False
        flip = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
        turned = Node("rel", b.args[::-1], tuple(flip.get(o, o) for o in b.value[::-1]))
        return any(a.value == c.value and all(self.same(x, y) for x, y in zip(a.args, c.args)) for c in (b, turned))

    # -- identities

    def _identical(self, a: Node, b: Node, names: frozenset[str]) -> bool:
        agreed = 0
        for point, real_only in self._points(names):
            same = self._same_at(a, b, point, real_only)
            if same is False:
                return False
            agreed += same is True
            if not names:
                break
        if not agreed:
            raise NoValue("no point where both sides are defined")
        return agreed >= (3 if names else 1)

    def _identical_up_to_case(self, a: Node, b: Node) -> bool:
        """X for x and c for C, where that names nothing twice."""
        left, right = symbols(a), symbols(b)
        lowered = {n.lower() for n in left}
        if (
            left == right
            or len(lowered) != len(left)
            or len({n.lower() for n in right}) != len(right)
            or lowered != {n.lower() for n in right}
        ):
            return False
        return self._identical(_lowered(a), _lowered(b), frozenset(lowered))

    def _points(self, names: frozenset[str]) -> Iterator[tuple[dict[str, Fraction], bool]]:
        """Positive points, where complex values are compared too; then negative and whole ones, only where both sides are real."""
        ordered = sorted(names)
        for k in range(4):
            yield {n: Fraction(_TENTHS[(3 * i + 5 * k) % 16] * (7 + i), 150 + 11 * k) for i, n in enumerate(ordered)}, False
        for k in range(3):
            yield {n: Fraction(-_TENTHS[(5 * i + 3 * k) % 16], 23 + 2 * k + i) for i, n in enumerate(ordered)}, True
        for k in range(2):
            yield {n: Fraction(2 + k + 2 * i) for i, n in enumerate(ordered)}, True

    def _same_at(self, a: Node, b: Node, point: dict[str, Fraction], real_only: bool) -> bool | None:
        """None where one side is undefined (or not real, when only reals count).

        A true difference is the same number at every precision; one that rounding made shrinks as the precision grows.
        """
        digits = DIGITS
        differences: list[Any] = []
        try:
            while len(differences) < 3:
                x, y, digits, _ = self._pair(a, b, point, digits)
                with self.mp.workdps(digits):
                    differences.append(x - y)
                    if len(differences) == 1 and abs(x - y) > max(1, abs(x), abs(y)) * self.mp.mpf(10) ** (-DIGITS // 2):
                        return None if real_only and (self.mp.im(x) != 0 or self.mp.im(y) != 0) else False
                    same = self._shrinks(differences)
                if same is not None:
                    break
                digits += DIGITS
        except NoValue:
            return None
        return None if real_only and (self._imaginary(x) or self._imaginary(y)) else bool(same)

    def _shrinks(self, differences: list[Any]) -> bool | None:
        """Whether the last difference is one of rounding; None: another evaluation must tell."""
        last, before = differences[-1], differences[-2] if len(differences) > 1 else None
        if before is None:
            return None
        if last == 0 or abs(last) <= abs(before) * self.mp.mpf(10) ** (-(DIGITS - 10)):
            return True
        if abs(last - before) <= abs(last) * self.mp.mpf(10) ** -10:
            return False
        return abs(last) <= abs(before) * self.mp.mpf(10) ** -15 if len(differences) > 2 else None

    def _pair(self, a: Node, b: Node, point: dict[str, Fraction], digits: int, spare: int = DIGITS) -> tuple[Any, Any, int, Any]:
        """Both values with `spare` digits between the largest and the smallest value met; the digits; a bound of the rounding."""
        for last in (False, False, True):
            with self.mp.workdps(digits):
                numeric = Numeric(self.mp)
                values = {n: self.mp.mpf(v.numerator) / v.denominator for n, v in point.items()}
                fault = None
                try:
                    x, y = numeric.value(a, values), numeric.value(b, values)
                except NoValue as error:  # what is small looks like zero as long as the digits are few
                    fault = error
                needed = spare + int((numeric.largest - numeric.smallest) * 0.302)
                if needed > MAX_DIGITS:
                    raise TooBig("values too far apart to compare")
                if needed <= digits or last:
                    if fault is not None:
                        raise fault
                    return x, y, digits, self.mp.mpf(10) ** (int(numeric.largest * 0.302) + 20 - digits)
            digits = needed
        raise AssertionError("the last evaluation returns")

    def _imaginary(self, x: Any) -> bool:
        return self.mp.im(x) != 0 and abs(self.mp.im(x)) > abs(x) * self.mp.mpf(10) ** -30

    # -- equations

    def _constant_ratio(self, f: Node, g: Node, names: frozenset[str]) -> Any | None:
        ratios = []
        for point, _ in list(self._points(names))[:4]:
            try:
                x, y, digits, rounding = self._pair(f, g, point, 2 * DIGITS, 2 * DIGITS)
            except NoValue:
                continue
            with self.mp.workdps(digits):
                if abs(x) < self.mp.mpf(10) ** -50 or abs(y) < self.mp.mpf(10) ** -50:
                    return None
                ratios.append((x / y, rounding * (1 / abs(x) + 1 / abs(y)), digits))
        if len(ratios) < 3:
            return None
        first, first_error, _ = ratios[0]
        for ratio, error, digits in ratios[1:]:
            with self.mp.workdps(digits):
                if abs(ratio - first) > abs(first) * (error + first_error):
                    return None
        return first

    def _solves(self, solved: Node, other: Node) -> bool:
        """`solved` is y = f(x): putting f(x) for y makes `other` vanish, and `other` is linear in y."""
        name, value = solved.args
        if name.op != "sym" or name.value in symbols(value):
            name, value = value, name
        if name.op != "sym" or name.value in symbols(value) or name.value not in symbols(other):
            return False
        zero = Node("num", (), Fraction(0))
        names = symbols(other) | symbols(value)
        put = substituted(other, name.value, value)
        if not self._identical(put, zero, names):
            return False
        shift = [substituted(other, name.value, Node("add", (name, Node("num", (), Fraction(k))))) for k in (1, 2)]
        second = Node("add", (shift[1], Node("mul", (Node("num", (), Fraction(-2)), shift[0])), other))
        return self._identical(second, zero, names) and not self._identical(shift[0], other, names)


def substituted(node: Node, name: str, value: Node) -> Node:
    if node.op == "sym":
        return value if node.value == name else node
    return node._replace(args=tuple(substituted(a, name, value) for a in node.args)) if node.args else node


def _lowered(node: Node) -> Node:
    if node.op == "sym":
        return node._replace(value=node.value.lower())
    return node._replace(args=tuple(_lowered(a) for a in node.args)) if node.args else node
