"""Values of expressions: exactly, as rationals, in any process; numerically, with mpmath, in the cage. Both refuse values that would be too
big."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from rlinf.rewards.math.forms import Node

CHEAP_BITS = 20_000  # of an exact number in this process
CAGE_BITS = 400_000


class TooBig(ValueError):
    """A value with more digits than this module is willing to compute."""


class NoValue(ValueError):
    """An expression without a value: division by zero, an unknown function, a set where a number should be."""


def exact(node: Node, bits: int = CHEAP_BITS) -> Fraction | None:
    """The rational value; None when the expression has symbols or is not seen to be rational. Raises TooBig and NoValue."""
    op = node.op
    if op == "num":
        return node.value
    if op == "dec":
        return node.value[0]
    if op == "based":
        return Fraction(int(node.value[0], node.value[1]))
    if op in ("sym", "const") or op not in _RATIONAL:
        return None
    values = []
    for argument in node.args:
        value = exact(argument, bits)
        if value is None:
            return None
        values.append(value)
    return _RATIONAL[op](node, values, bits)


def size(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _checked(value: Fraction, bits: int) -> Fraction:
    if size(value) > bits:
        raise TooBig("a number with too many digits")
    return value


def _add(_: Node, values: list[Fraction], bits: int) -> Fraction:
    total = Fraction(0)
    for value in values:  # checked at every step: a long sum of unlike denominators is slow before it is big
        total = _checked(total + value, bits * 2)
    return total


def _mul(_: Node, values: list[Fraction], bits: int) -> Fraction:
    total = Fraction(1)
    for value in values:
        total = _checked(total * value, bits * 2)
    return total


def _div(_: Node, values: list[Fraction], bits: int) -> Fraction:
    if values[1] == 0:
        raise NoValue("division by zero")
    return _checked(values[0] / values[1], bits * 2)


def _pow(_: Node, values: list[Fraction], bits: int) -> Fraction | None:
    base, exponent = values
    if exponent.denominator != 1:
        if exponent.denominator > 64 or base <= 0:
            return None
        root = perfect_root(base, exponent.denominator)
        return None if root is None else _pow(_, [root, Fraction(exponent.numerator)], bits)
    n = exponent.numerator
    if base == 0 and n <= 0:
        raise NoValue("zero to a power that is not positive")
    if abs(base) != 1 and base != 0 and size(base) * abs(n) > bits:
        raise TooBig("a power with too many digits")
    if base in (0, 1, -1):
        return base if n % 2 or base != -1 else Fraction(1)
    return base**n


def _percent(_: Node, values: list[Fraction], bits: int) -> Fraction:
    return values[0] / 100


def _function(node: Node, values: list[Fraction], bits: int) -> Fraction | None:
    name, x = node.value, values[0]
    whole = all(v.denominator == 1 for v in values)
    if name == "sqrt" and x >= 0:
        return perfect_root(x, 2)
    if name == "abs":
        return abs(x)
    if name in ("floor", "ceil"):
        return Fraction(math.floor(x) if name == "floor" else math.ceil(x))
    if name in ("min", "max"):
        return min(values) if name == "min" else max(values)
    if name == "factorial" and whole and x >= 0:
        if x > 5000 or x * 12 > bits:
            raise TooBig("a factorial with too many digits")
        return Fraction(math.factorial(int(x)))
    if name == "binomial" and whole and len(values) == 2 and values[0] >= 0 and values[1] >= 0:
        n, k = int(values[0]), int(values[1])
        if min(k, abs(n - k)) * max(n, 2).bit_length() > bits:
            raise TooBig("a binomial with too many digits")
        return Fraction(math.comb(n, k))
    if name in ("gcd", "lcm") and whole:
        return Fraction((math.gcd if name == "gcd" else math.lcm)(*(int(v) for v in values)))
    return None


_RATIONAL = {
    "add": _add, "mul": _mul, "div": _div, "pow": _pow, "percent": _percent, "fn": _function,
    "neg": lambda _, values, bits: -values[0], "quantity": lambda _, values, bits: values[0],
}  # fmt: skip


def perfect_root(value: Fraction, n: int) -> Fraction | None:
    """The rational n-th root, when there is one."""
    if size(value) > CHEAP_BITS or value < 0:
        return None
    top, bottom = _integer_root(value.numerator, n), _integer_root(value.denominator, n)
    return Fraction(top, bottom) if top is not None and bottom is not None else None


def _integer_root(value: int, n: int) -> int | None:
    if value < 2:
        return value
    if n == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    low, high = 1, 1 << (value.bit_length() // n + 1)
    while low < high:  # bisection: exact for any size
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**n <= value else (low, middle - 1)
    return low if low**n == value else None


# -- numerically, in the cage


class Numeric:
    """Evaluates with mpmath at the current precision of `mp`; remembers how large and how small values were, to choose the precision by."""

    def __init__(self, mp: Any) -> None:
        self.mp = mp
        # Binary exponents met. A sum that cancels or a sine may be small by rounding alone: it does not count among the smallest.
        self.largest = self.smallest = 0

    def value(self, node: Node, point: Mapping[str, Any]) -> Any:
        result = self._value(node, point)
        if result != result or self.mp.isinf(result):
            raise NoValue("not a finite number")
        if result != 0:
            exponent = int(self.mp.mag(abs(result)))
            if exponent > 20_000:
                raise TooBig("a value too large to compare")
            self.largest = max(self.largest, exponent)
            if node.op not in ("add", "fn") or node.value == "exp":
                self.smallest = min(self.smallest, exponent)
        return result

    def _value(self, node: Node, point: Mapping[str, Any]) -> Any:
        mp, op = self.mp, node.op
        if op == "num":
            return mp.mpf(node.value.numerator) / node.value.denominator
        if op == "dec":
            return mp.mpf(node.value[0].numerator) / node.value[0].denominator
        if op == "sym":
            return point[node.value]
        if op == "const":
            return self._constant(node.value)
        if op == "based":
            return mp.mpf(int(*node.value))
        args = [self.value(a, point) for a in node.args]
        if op == "neg":
            return -args[0]
        if op == "add":
            return mp.fsum(args)
        if op == "mul":
            return mp.fprod(args)
        if op == "div":
            if self._is_zero(args[1]):
                raise NoValue("division by zero")
            return args[0] / args[1]
        if op == "pow":
            return self._power(*args)
        if op == "percent":
            return args[0] / 100
        if op == "degree":
            return args[0] * mp.pi / 180
        if op == "quantity":
            return args[0]
        if op == "fn":
            return self._function(node.value, args)
        raise NoValue(f"{op} has no number")

    def _constant(self, name: str) -> Any:
        if name == "inf":
            raise NoValue("infinity")
        return {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.mpc(0, 1)}[name]

    def _is_zero(self, x: Any) -> bool:
        return x == 0 or self.mp.mag(abs(x)) < -3.2 * self.mp.dps

    def _power(self, base: Any, exponent: Any) -> Any:
        mp = self.mp
        if self._is_zero(base):
            if mp.re(exponent) <= 0:
                raise NoValue("zero to a power that is not positive")
            return mp.mpf(0)
        if abs(exponent) * max(1, abs(int(mp.mag(abs(base))))) > 40_000:
            raise TooBig("a power too large to compare")
        if mp.im(base) == 0 and mp.re(base) < 0 and mp.im(exponent) == 0:
            odd = self._odd_root(exponent)
            if odd is not None:
                return odd * mp.power(-base, exponent)
        return mp.power(base, exponent)

    def _odd_root(self, exponent: Any) -> int | None:
        """The sign of (-1)^(p/q) as a real number when q is odd and small (the real cube root of -8 is -2); None: complex."""
        for q in (1, 3, 5, 7):
            p = exponent * q
            nearest = self.mp.nint(p)
            if abs(p - nearest) < self.mp.mpf(10) ** (-self.mp.dps + 8):
                return -1 if int(nearest) % 2 else 1
        return None

    def _function(self, name: str, args: list[Any]) -> Any:
        mp, x = self.mp, args[0]
        simple = {
            "sqrt": mp.sqrt, "exp": mp.exp, "abs": abs, "norm": abs, "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot,
            "sec": mp.sec, "csc": mp.csc, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "coth": mp.coth, "sech": mp.sech,
            "csch": mp.csch, "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "arccot": mp.acot, "arcsec": mp.asec,
            "arccsc": mp.acsc, "asin": mp.asin, "acos": mp.acos, "atan": mp.atan, "arcsinh": mp.asinh, "arccosh": mp.acosh,
            "arctanh": mp.atanh, "floor": mp.floor, "ceil": mp.ceil, "arg": mp.arg, "Re": mp.re, "Im": mp.im, "sgn": mp.sign,
        }  # fmt: skip
        if name in simple and len(args) == 1:
            if mp.mag(abs(x)) > 64 and name not in ("sqrt", "abs", "norm", "arg", "Re", "Im", "sgn"):
                raise TooBig("an argument too large")
            return simple[name](x)
        if name in ("ln", "log", "lg") and not any(self._is_zero(a) for a in args):
            base = args[1] if len(args) == 2 else mp.e if name == "ln" else mp.mpf(10)
            return mp.log(x) / mp.log(base)
        if name == "cbrt":
            return self._power(x, mp.mpf(1) / 3)
        if name == "factorial":
            return mp.factorial(x) if abs(x) < 5000 else self._too_big()
        if name == "binomial" and len(args) == 2:
            return mp.binomial(*args) if max(abs(a) for a in args) < 5000 else self._too_big()
        if name in ("min", "max") and all(mp.im(a) == 0 for a in args):
            return min(args) if name == "min" else max(args)
        raise NoValue(f"{name} of {len(args)} arguments has no value")

    def _too_big(self) -> Any:
        raise TooBig("an argument too large")
