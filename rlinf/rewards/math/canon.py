r"""Brings answers that mean the same in different forms to one form, such as `x = 5`, `x \in \{5\}`, `\pm 2` and `5 \text{ cm}`."""

from __future__ import annotations

from fractions import Fraction

from rlinf.rewards.math.forms import Malformed, Node, has, symbols

_UNKNOWNS = "xyzabc"  # xy = 1 is an equation; AB = 1, f(x) = 1 and P(A) = 1 give names
_FUNCTION_NAMES = frozenset("fghFGHP")
_TAGS = ("percent", "degree", "quantity")


def canonical(node: Node) -> Node:
    """Tags (unit, percent, degree) outside, \\pm written out, headings (`x =`) as `assign` nodes, nested lists flat."""
    if has(node, "pm"):
        return canonical(Node("list", tuple(_with_sign(node, s) for s in (1, -1)), ","))
    if node.op == "list":
        return _list(node)
    if node.op == "rel":
        return _relation(node)
    if node.op == "builder":
        return _builder(node)
    if node.op == "mod":
        inner = canonical(node.args[0])
        return Node("mod", (inner.args[0] if inner.op == "assign" else inner, node.args[1]))
    if node.op in ("add", "mul", "neg", "div"):
        node = arithmetic(node)
    if node.op in ("tuple", "set", "matrix"):
        return node._replace(args=tuple(canonical(a) for a in node.args))
    if node.op == "add" and len(node.args) == 2 and node.args[0].op == "reals" and node.args[1].op == "neg":
        return Node("minus", (node.args[0], node.args[1].args[0]))
    return lifted(node)


def lifted(node: Node) -> Node:
    """`-(5 cm)` and `(5 $) * 10^6` with the tag outside."""
    if node.op == "neg":
        inner = lifted(node.args[0])
        return inner._replace(args=(Node("neg", inner.args),)) if inner.op in _TAGS else node
    if node.op == "mul":
        tagged = [i for i, a in enumerate(node.args) if a.op in _TAGS]
        if len(tagged) == 1 and node.args[tagged[0]].op == "quantity":
            i = tagged[0]
            args = (*node.args[:i], node.args[i].args[0], *node.args[i + 1 :])
            return node.args[i]._replace(args=(Node("mul", args),))
    if node.op == "quantity" and node.args[0].op == "quantity":  # $5 per hour
        outer, inner = node.value, node.args[0].value
        dimension = dict(inner.dimension)
        for name, power in outer.dimension:
            dimension[name] = dimension.get(name, 0) + power
        unit = outer._replace(dimension=tuple(sorted((n, p) for n, p in dimension.items() if p)), scale=outer.scale * inner.scale)
        return Node("quantity", node.args[0].args, unit)
    return node


def arithmetic(node: Node) -> Node:
    """Computes sums of vectors and of matrices, and their multiples by numbers, entry by entry."""
    args = tuple(arithmetic(a) if a.op in ("add", "mul", "neg", "div") else a for a in node.args)
    shaped = [a for a in args if a.op in ("tuple", "matrix")]
    if (
        not shaped
        or (node.op == "add" and len(shaped) != len(args))
        or (node.op == "mul" and len(shaped) != 1)
        or (node.op == "div" and args[1] in shaped)
    ):
        return node
    first = shaped[0]
    if node.op == "add":
        if any(a.op != first.op or a.value != first.value or len(a.args) != len(first.args) for a in shaped):
            raise Malformed("a sum of different shapes")
        return first._replace(args=tuple(arithmetic(Node("add", entries)) for entries in zip(*(a.args for a in shaped))))

    def scaled(entry: Node) -> Node:
        if entry.op == "tuple":
            return entry._replace(args=tuple(scaled(e) for e in entry.args))
        return Node(node.op, tuple(entry if a is first else a for a in args))

    return first._replace(args=tuple(scaled(entry) for entry in first.args))


def items_of(node: Node) -> tuple[Node, ...]:
    return node.args if node.op in ("list", "set") else (node,)


def _with_sign(node: Node, sign: int) -> Node:
    if node.op == "pm":
        positive = (node.value == "\\pm") == (sign > 0)
        inner = _with_sign(node.args[0], sign)
        return inner if positive else Node("neg", (inner,))
    if node.op == "list":  # only the items that hold the sign double
        return Node("list", tuple(_with_sign(a, sign) for a in node.args if sign > 0 or has(a, "pm")), node.value)
    return node._replace(args=tuple(_with_sign(a, sign) for a in node.args)) if node.args else node


def _list(node: Node) -> Node:
    items: list[Node] = []
    for argument in node.args:
        inner = canonical(argument)
        items += inner.args if inner.op == "list" else (inner,)
    if len(items) == 1:
        return items[0]
    if node.value == "and" and all(i.op == "quantity" and i.value.dimension for i in items):
        return _summed(items)
    return Node("list", tuple(_spread_heading(items)), node.value)


def _spread_heading(items: list[Node]) -> list[Node]:
    """`x = 1, 2` says x = 1 and x = 2."""
    if items and items[0].op == "assign" and all(i.op != "assign" and i.op != "rel" for i in items[1:]):
        head = items[0]
        return [head, *(Node("assign", (i, head.args[1]), head.value) for i in items[1:])]
    return items


def _summed(items: list[Node]) -> Node:
    """`2 hours and 30 minutes` is one quantity; equal or growing units stay a list."""
    scales = [i.value.scale for i in items]
    if len({i.value.dimension for i in items}) > 1 or scales != sorted(set(scales), reverse=True):
        return Node("list", tuple(items), "and")
    terms = tuple(Node("mul", (i.args[0], Node("num", (), i.value.scale))) for i in items)
    return Node("quantity", (Node("add", terms),), items[0].value._replace(scale=type(scales[0])(1)))


# -- relations


def heading(node: Node) -> str | None:
    r"""The name that a left side such as `x`, `x_1`, `f(x)`, `(x, y)`, `\text{Area}`, `AB` or `\sin A` gives; None: no name."""
    if node.op == "sym":
        return node.value
    if node.op == "mul" and all(a.op == "sym" and not a.value.startswith("text ") for a in node.args) and len(node.args) <= 4:
        return "".join(a.value for a in node.args)
    if node.op == "mul" and len(node.args) == 2 and node.args[0].op == "sym" and node.args[1].op == "tuple":
        return node.args[0].value
    if (named := _applied(node)) is not None:
        return named
    if node.op in ("div", "ratio") and node.args:  # each side once: x/x/x/... would double the work at every stroke
        names = [side for a in node.args if (side := heading(a))]
        return ("/" if node.op == "div" else ":").join(names) if len(names) == len(node.args) else None
    if node.op == "tuple" and all(a.op == "sym" for a in node.args):
        return f"({','.join(a.value for a in node.args)})"
    if node.op == "fn" and node.value in (
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "abs",
        "norm",
        "arg",
        "Re",
        "Im",
        "gcd",
        "lcm",
        "min",
        "max",
    ):
        inner = [heading(a) for a in node.args]
        return f"{node.value} {' '.join(i for i in inner if i)}" if all(inner) else None
    if node.op == "add" and all(a.op == "sym" or a.op == "neg" and a.args[0].op == "sym" for a in node.args):
        return "+".join(a.value if a.op == "sym" else f"-{a.args[0].value}" for a in node.args)
    return None


def _applied(node: Node) -> str | None:
    r"""The name of `f(2)` and `f^{-1}(x)`, which the grammar reads as products; only where f is a usual name of a function."""
    if node.op != "mul" or len(node.args) != 2:
        return None
    function, argument = node.args
    inverse = function.op == "pow" and function.args[1] == Node("neg", (Node("num", (), Fraction(1)),))
    function = function.args[0] if inverse else function
    negative = argument.op == "neg"
    inner = argument.args[0] if negative else argument
    if function.op != "sym" or function.value not in _FUNCTION_NAMES or inner.op not in (("num", "sym") if inverse else ("num",)):
        return None
    return f"{function.value}{'^-1' if inverse else ''}({'-' if negative else ''}{inner.value})"


def _is_derivative(node: Node) -> bool:
    return node.op == "div" and all(a.op == "mul" and len(a.args) == 2 and a.args[0] == Node("sym", (), "d") for a in node.args)


def is_simple_name(node: Node) -> bool:
    """x, x_1, f(x), (x, y), Area, AB: what a solution is given for; not the sum or the function that an equation may hold."""
    if heading(node) is None or node.op not in ("sym", "tuple", "mul", "fn", "div", "ratio"):
        return False
    if node.op in ("fn", "div"):  # |AB| = 1 and AB/CD = 2, not |x| = 1
        return all(a.op == "mul" and is_simple_name(a) for a in node.args)
    return node.op != "mul" or _applied(node) is not None or node.args[0].value[0] not in _UNKNOWNS


def _relation(node: Node) -> Node:
    sides, operators = node.args, node.value
    if all(o in ("=", "~", "equiv") for o in operators):
        return _equality(node)
    if operators == ("in",):
        inner = canonical(sides[1])
        name = heading(sides[0])
        if name is None:
            raise Malformed("a membership of something that is no name")
        if inner.op == "set":
            return Node("list", tuple(Node("assign", (i, sides[0]), name) for i in inner.args), ",") if inner.args else inner
        return Node("member", (inner,), name)
    return Node("rel", sides, operators)


def _equality(node: Node) -> Node:
    sides, operators = list(node.args), list(node.value)
    rounded: tuple[Node, ...] = ()
    if "~" in operators:  # an approximation is said beside the value; of `x ~ 3.46` it is the value
        first = operators.index("~") + (heading(sides[0]) is not None and operators[0] == "~")
        sides, after = sides[: first + 1], sides[first + 1 :]
        rounded = tuple(Node("approx", (lifted(s),)) for s in after)
        if len(sides) == 1:
            return Node("assign", (canonical(sides[0]), sides[0], *rounded), "")
    if len(sides) == 2 and heading(sides[0]) is None and is_simple_name(sides[1]):
        sides.reverse()
    name, last = heading(sides[0]), sides[-1]
    if name is not None and not (_free_names(sides[0]) & symbols(last)):
        values = [s for s in sides[1:] if heading(s) is None or s is last]
        name = "=".join([name, *(middle for s in sides[1:-1] if (middle := heading(s)) is not None)])
        chain = tuple(lifted(v) for v in values)
        value = canonical(last)
        if value.op == "list":
            return Node("list", tuple(Node("assign", (v, sides[0]), name) for v in value.args), ",")
        return Node("assign", (value, sides[0], *chain[:-1], *rounded), name)
    if not any(symbols(s) for s in sides):
        return Node("assign", (canonical(last), sides[0], *(lifted(s) for s in sides[:-1]), *rounded), "")
    if len(sides) > 2:
        raise Malformed("a chain of equations")
    return Node("rel", tuple(sides), ("=",))


def _free_names(node: Node) -> frozenset[str]:
    """The symbols that the right side may not hold if this is to be its name: of f(x), only f."""
    if _is_derivative(node):  # of dy/dx, only y
        return symbols(node.args[0].args[1])
    return symbols(node.args[0]) if node.op == "mul" and is_simple_name(node) else symbols(node)


def _builder(node: Node) -> Node:
    variable, conditions = node.args
    if variable.op == "rel" and variable.value == ("in",):
        variable = variable.args[0]
    name, inner = heading(variable), canonical(conditions)
    if name is None or any(not symbols(variable) & symbols(c) for c in items_of(inner)):
        raise Malformed("a set of something that is no name, or with conditions on something else")
    if inner.op == "list":
        inner = Node("list", inner.args, "or" if inner.value == "or" else "and")
    return Node("member", (inner,), name)
