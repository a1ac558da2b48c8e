r"""The upper half of the grammar of answers: tokens -> Node. Recursive descent, bounded depth, linear.

answer   = relation ((, | ; | and | or) relation)*
relation = ratio ((= | < | \in | ...) ratio)* [mod n]
ratio    = sets (: sets)*
sets     = sum ((\cup | \cap | \setminus) sum)*
sum      = [+ | - | \pm] term ((+ | - | \pm) term)* [unit]
term     = power ((* | / | nothing) power)*
power    = atom (^ exponent | ! | % | degree)*
"""

from __future__ import annotations

import re
from fractions import Fraction

from rlinf.rewards.math.atoms import (
    ATOMS,
    BEYOND,
    CURRENCIES,
    DECORATIONS,
    DOTS,
    MAX_PARTS,
    TIMES,
    AtomParser,
    number_node,
    signed,
)
from rlinf.rewards.math.forms import Malformed, Node, TooDeep, Unknown, Unsupported, has, height
from rlinf.rewards.math.lexer import FUNCTIONS, GREEK, INFINITIES, Token, lex
from rlinf.rewards.math.units import MULTIPLIERS, UNITS, Unit, lookup, make_unit

RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=",
    "\\ge": ">=", "\\geq": ">=", "\\geqslant": ">=", "\\lt": "<", "\\gt": ">", "\\ne": "!=", "\\neq": "!=", "\\in": "in", "\\approx": "~",
    "\\simeq": "~", "\\equiv": "equiv",
}  # fmt: skip
SET_OPERATORS = {
    "\\cup": "union",
    "\\cap": "intersection",
    "\\setminus": "minus",
    "\\backslash": "minus",
    "\\bigcup": "union",
    "\\bigcap": "intersection",
}
NOT_FACTORS = frozenset("and or in mod percent pct percentage degree degrees deg per base".split())
MORE_COMMANDS = frozenset("\\to \\rightarrow \\infty \\circ \\prime \\{ \\} \\% \\\\ \\choose \\mid".split())
_UNION_LETTER = re.compile(r"(?<=[)\]}])\s*U\s*(?=[(\[\\])")


def parse(s: str, max_depth: int = 40) -> Node:
    """The tree of a cleaned answer. Raises Malformed (Unsupported for mathematics beyond the grammar, Unknown) or TooDeep."""
    tokens = lex(_UNION_LETTER.sub(r"\\cup ", s))
    parser = Parser(list(tokens), max_depth)
    try:
        node = parser.answer()
    except Unsupported:
        if strange := next((t.value for t in tokens if not _is_known(t)), None):  # another reader would drop it
            raise Unknown(f"{strange} is not known here") from None
        raise
    if parser.peek() is not None:
        raise Malformed(f"cannot read from {parser.value()[:20]!r} on")
    if height(node) > 2 * max_depth:  # chains such as 1/2/3/... grow a tree without nesting
        raise TooDeep("a chain too long")
    return node


def _is_known(token: Token) -> bool:
    value = token.value
    if token.kind == "op":
        return value not in ("<", ">", "<=", ">=", "!=", "~", "->", "?")
    groups = (ATOMS, BEYOND, TIMES, DECORATIONS, DOTS, MORE_COMMANDS)
    return token.kind != "cmd" or value[1:] in FUNCTIONS or value[1:] in GREEK or any(value in group for group in groups)


class Parser(AtomParser):
    def answer(self) -> Node:
        parts, words = [self.relation()], set()
        while (word := self.separator()) is not None:
            words.add(word)
            if self.peek() is None:
                break
            parts.append(self.relation())
            if len(parts) > MAX_PARTS:
                raise TooDeep("too many parts")
        if len(parts) == 1:
            return parts[0]
        return Node("list", tuple(parts), "or" if "or" in words else "and" if "and" in words else ",")

    def separator(self) -> str | None:
        found = None
        while value := self.value():
            if value in (",", ";", "\\&"):
                found = found or ","
            elif value in ("or", "\\lor", "\\vee"):
                found = "or"
            elif value in ("and", "\\land", "\\wedge"):
                found = "and"
            else:
                break
            self.pos += 1
        return found

    def ratio(self) -> Node:
        r"""`1:\sqrt{3}`; in the first half of a set, the : ends the variable."""
        terms = [self.sets()]
        while not self.builder and self.take(":", "\\colon"):
            terms.append(self.sets())
            if len(terms) > MAX_PARTS:
                raise TooDeep("too many terms")
        if len(terms) > 1 and any(has(t, "quantity") for t in terms):
            raise Malformed("a ratio of quantities")
        return terms[0] if len(terms) == 1 else Node("ratio", tuple(terms))

    def relation(self) -> Node:
        sides, operators = [self.ratio()], []
        while self.value() in RELATIONS or (self.value() == "in" and self.value(1) in ("(", "[", "\\{", "\\mathbb")):
            operators.append(RELATIONS.get(self.value(), "in"))
            self.pos += 1
            sides.append(self.ratio())
        return self.modulus(Node("rel", tuple(sides), tuple(operators)) if operators else sides[0])

    def modulus(self, node: Node) -> Node:
        if self.take("\\pmod"):
            return Node("mod", (node, self.group()))
        if self.value() == "(" and self.value(1) in ("mod", "\\mod", "\\bmod"):
            self.pos += 2
            modulus = self.sum()
            self.need(")")
            return Node("mod", (node, modulus))
        if self.take("\\mod", "\\bmod", "mod"):
            return Node("mod", (node, self.sum()))
        return node

    def sets(self) -> Node:
        node = self.sum()
        if self.take("\\choose"):
            node = Node("fn", (node, self.sum()), "binomial")
        while self.value() in SET_OPERATORS:
            operator = SET_OPERATORS[self.value()]
            self.pos += 1
            node = Node(operator, (node, self.sum()))
        return node

    # -- sums and products

    def sum(self) -> Node:
        self.deeper()
        terms = [signed(self.sign(), self.term())]
        while self.value() in ("+", "-", "\\pm", "\\mp") and len(terms) <= MAX_PARTS:
            terms.append(signed(self.sign(), self.term()))
        if len(terms) > MAX_PARTS:
            raise TooDeep("too many terms")
        self.depth -= 1
        return self.with_unit(terms[0] if len(terms) == 1 else Node("add", tuple(terms)))

    def sign(self) -> str:
        """The sign at this place; `--` is `+`, and no other two signs may meet."""
        if self.value() not in ("+", "-", "\\pm", "\\mp"):
            return ""
        sign = self.need(self.value())
        if self.value() in ("+", "-", "\\pm", "\\mp"):
            if not (sign in "+-" and self.value() == "-"):
                raise Malformed("two signs")
            self.pos += 1
            sign = "+" if sign == "-" else "-"
        return sign

    def term(self) -> Node:
        factors = [self.power()]
        while (token := self.peek()) is not None:
            if token.value in TIMES:
                self.pos += 1
                factors.append(signed(self.sign(), self.power()))
            elif token.value in ("/", "\\div"):
                if self.unit_after_slash():
                    break
                self.pos += 1
                factors[-1] = Node("div", (factors[-1], signed(self.sign(), self.power())))
            elif token.kind == "word" and token.value in MULTIPLIERS:
                self.pos += 1
                factors.append(Node("num", (), Fraction(MULTIPLIERS[token.value])))
            elif self.starts_factor(token, factors[-1]):
                factors.append(self.power())
            else:
                break
            if len(factors) > MAX_PARTS:
                raise TooDeep("too many factors")
        return _product(factors)

    def unit_after_slash(self) -> bool:
        token = self.peek(1)
        return token is not None and token.kind == "word" and (token.text or len(token.value) > 1) and lookup(token.value) is not None

    def starts_factor(self, token: Token, before: Node) -> bool:
        """Whether a product goes on here without an operator."""
        value = token.value
        if token.kind == "word":
            if value in FUNCTIONS:
                return not (token.text and value in UNITS and self.value(1) not in ("(", "{"))
            if token.text:
                return len(value) == 1 and value not in UNITS
            return value not in NOT_FACTORS and not _spells_unit(value)
        if token.kind == "env":
            return value.startswith("\\begin")
        if token.kind == "cmd":
            return value in ATOMS or value[1:] in FUNCTIONS or value[1:] in GREEK or value in DECORATIONS or value in BEYOND
        if token.kind == "num":  # n2^{n-1}, 2^a 3^b; but 2 3, x 3 and 1/2 3 are nothing
            power = self.value(1) in ("^", "**") and before.op not in ("num", "dec", "neg")
            return power and not token.text and self.value(-2) not in ("/", "\\div")
        if value == "|":
            return not self.bars and not self.builder
        if token.text and value == "(":
            return False
        return value in ("{", "[") or (value == "(" and self.value(1) not in ("mod", "\\mod", "\\bmod"))

    def power(self) -> Node:
        node = self.atom()
        while value := self.value():
            if value in ("^", "**"):
                self.pos += 1
                node = self.raised(node)
            elif value == "!":
                self.pos += 1
                if self.value() == "!":
                    raise Unsupported("a double factorial")
                node = Node("fn", (node,), "factorial")
            elif value in ("\\%", "%"):
                self.pos += 1
                node = Node("percent", (node,))
            elif value == "\\degree":
                self.pos += 1
                node = self.degrees(node)
            elif value in ("'", "\\prime") and node.op == "sym":
                self.pos += 1
                node = Node("sym", (), node.value + "'")
            else:
                break
        return node

    def raised(self, base: Node) -> Node:
        if self.take("\\circ", "\\degree"):
            return self.degrees(base)
        if self.value() == "{" and self.value(1) in ("\\circ", "\\degree", "\\prime") and self.value(2) == "}":
            self.pos += 3
            return self.degrees(base) if self.value(-2) != "\\prime" else Node("sym", (), f"{base.value}'")
        if self.take("\\prime"):
            return Node("sym", (), f"{base.value}'")
        return Node("pow", (base, self.exponent()))

    def degrees(self, node: Node) -> Node:
        r"""What follows ^\circ: nothing, C or F (a temperature), or minutes (30')."""
        if self.value() in ("C", "F") and self.value(1) in ("", ",", ")", "]", "and", "or"):
            return Node("quantity", (node,), UNITS[f"deg{self.need('C', 'F')}"])
        token = self.peek()
        if token is not None and token.kind == "num":
            after = [self.value(i) for i in range(1, 5)]
            primes = 2 if after[0] in ("'", "\\prime") else 3 if after[:2] == ["^", "\\prime"] else 0
            primes = 5 if after == ["^", "{", "\\prime", "}"] else primes
            if primes:
                self.pos += primes
                minutes = Node("div", (number_node(token.value), Node("num", (), Fraction(60))))
                node = Node("add", (node, minutes))
        return Node("degree", (node,))

    # -- units

    def with_unit(self, node: Node) -> Node:
        """The sum with its unit: `5 cm`, `3 hours 20 minutes`, `50 percent`, `12 apples`."""
        pieces = self.unit_pieces()
        if not pieces:
            return node
        if pieces in (["percent"], ["per", "cent"], ["pct"], ["percentage"]):
            return Node("percent", (node,))
        if len(pieces) == 1 and pieces[0] in ("degree", "degrees", "deg"):
            return Node("degree", (node,))
        unit = make_unit(pieces)
        if unit is None:
            raise Malformed(f"{' '.join(pieces)} is no unit")
        node = Node("quantity", (node,), unit)
        following = self.peek()
        if following is None or following.kind != "num" or not unit.dimension:
            return node
        rest = self.sum()
        if rest.op != "quantity" or rest.value.dimension != unit.dimension or rest.value.scale >= unit.scale:
            raise Malformed("two quantities side by side")
        parts = tuple(Node("mul", (q.args[0], Node("num", (), q.value.scale))) for q in (node, rest))
        return Node("quantity", (Node("add", parts),), Unit(unit.dimension, Fraction(1)))

    def unit_pieces(self) -> list[str]:
        pieces: list[str] = []
        opened = 0  # parentheses around a unit: 5 (cm)
        while (token := self.peek()) is not None:
            value, following = token.value, self.peek(1)
            before_word = following is not None and following.kind == "word"
            if token.kind == "word":
                is_unit = value in UNITS and (token.text or len(value) > 1)
                if value in ("and", "or", "mod") or not (
                    is_unit or value not in FUNCTIONS and (token.text or len(value) > 1 or pieces[-1:] == ["/"])
                ):
                    break
                pieces.append(value)
            elif value in CURRENCIES and not pieces:
                pieces.append(CURRENCIES[value])
            elif value == "^" and pieces:
                self.pos += 1
                pieces.append(f"^{self.raw_group()}" if self.value() != "-" else f"^-{self.need('-') and self.raw_group()}")
                if not re.fullmatch(r"\^-?\d{1,2}", pieces[-1]):
                    raise Malformed("a unit with that power")
                continue
            elif value == "/" and (pieces or self.unit_after_slash()) and before_word:
                pieces.append("/")
            elif value in TIMES and pieces and before_word:
                pieces.append("*")
            elif token.text and value == "(" and before_word:
                opened += 1
            elif token.text and value == ")" and opened:
                opened -= 1
            elif not (token.text and value in (".", "-")):
                break
            self.pos += 1
            if len(pieces) > 12:
                raise Malformed("too many words after a number")
        return pieces


def _spells_unit(word: str) -> bool:
    if len(word) < 2 or word in GREEK or word in INFINITIES or word == "pi":
        return False
    return word in UNITS or len(word) >= 4


def _product(factors: list[Node]) -> Node:
    """A product; a capital before a tuple, as in P(3, 4), names the tuple."""
    if len(factors) == 1:
        return factors[0]
    if len(factors) == 2 and factors[0].op == "sym" and factors[0].value[:1].isupper() and factors[1].op == "tuple":
        return Node("rel", tuple(factors), ("=",))
    return Node("mul", tuple(factors))
