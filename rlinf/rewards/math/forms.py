"""What an answer is, once read: a tree of nodes.

num Fraction | dec (Fraction, decimals, significant digits) | sym name | const pi, e, i, inf | add, mul (args) | neg, div, pow |
fn name (args) | pm, mp (args) | percent, degree | quantity (arg) Unit | mod (value, modulus) |
tuple (items) brackets | set (items) | list (items) separator | union, intersection, minus (args) | builder (variable, conditions) |
rel (sides) operators | matrix (rows: tuple nodes) | cases | abs | text | based (digits, base) | clock | date | ratio | choice
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Node(NamedTuple):
    op: str
    args: tuple[Node, ...] = ()
    value: Any = None


class Malformed(ValueError):
    """An answer that none of our grammars can read."""


class Unsupported(Malformed):
    """Mathematics that our grammar does not read and leaves to math-verify (integrals, sums, limits, ...)."""


class Unknown(Malformed):
    """An unknown command: what it does to the rest of the answer cannot be said."""


class TooDeep(ValueError):
    """An answer that is nested more deeply than the parser allows."""


EMPTY_SET = Node("set")
REALS = Node("reals")
INFINITY = Node("const", (), "inf")


def has(node: Node, op: str) -> bool:
    return node.op == op or any(has(a, op) for a in node.args)


def symbols(node: Node) -> frozenset[str]:
    """Names of the free symbols."""
    if node.op == "sym":
        return frozenset((node.value,))
    return frozenset().union(*(symbols(a) for a in node.args)) if node.args else frozenset()


def height(node: Node) -> int:
    """Of the tree; without recursion, since it may be what makes recursion unsafe."""
    levels, level = 0, [node]
    while level:
        levels, level = levels + 1, [a for n in level for a in n.args]
    return levels
