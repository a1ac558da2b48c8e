"""The lower half of the grammar of answers: numbers, symbols, groups, functions, brackets, matrices. The upper half (parse.py) builds on
it."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from rlinf.rewards.math.forms import (
    EMPTY_SET,
    INFINITY,
    REALS,
    Malformed,
    Node,
    TooDeep,
    Unknown,
    Unsupported,
)
from rlinf.rewards.math.lexer import FUNCTIONS, GREEK, INFINITIES, Token
from rlinf.rewards.math.units import UNITS

TIMES = frozenset(("*", "\\cdot", "\\times", "\\ast", "\\bullet"))
DECORATIONS = frozenset("\\overline \\bar \\vec \\hat \\widehat \\tilde \\widetilde \\overrightarrow \\dot \\ddot \\overarc".split())
SETS = {"R": REALS, "Z": Node("sym", (), "ZZ"), "N": Node("sym", (), "NN"), "Q": Node("sym", (), "QQ"), "C": Node("sym", (), "CC")}
_NARROWED = {  # what stands above or below R, by the condition that it means; N^* and Z^+ are the same numbers
    "+": ">0", "-": "<0", ">0": ">0", "<0": "<0", "\\gt0": ">0", "\\lt0": "<0", ">=0": ">=0", "\\ge0": ">=0", "\\geq0": ">=0",
    "\\geqslant0": ">=0", "<=0": "<=0", "\\le0": "<=0", "\\leq0": "<=0", "\\leqslant0": "<=0", "*": "*",
}  # fmt: skip
OPENERS = {"(": ")", "[": "]", "\\{": "\\}", "\\lbrace": "\\rbrace", "\\langle": "\\rangle"}
CURRENCIES = {"\\$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "\\pounds": "£", "\\euro": "€", "\\yen": "¥"}
DOTS = frozenset(("...", "\\ldots", "\\dots", "\\cdots"))
CONSTANTS = {"\\pi": "pi", "\\infty": "inf"}
EMPTY = frozenset(("\\emptyset", "\\varnothing"))
FENCES = {
    "\\lfloor": ("\\rfloor", "floor"),
    "\\lceil": ("\\rceil", "ceil"),
    "\\lvert": ("\\rvert", "abs"),
    "\\lVert": ("\\rVert", "norm"),
    "\\|": ("\\|", "norm"),
}
BINOMIALS = frozenset(("\\binom", "\\dbinom", "\\tbinom"))
ATOMS = (
    EMPTY
    | BINOMIALS
    | frozenset(FENCES)
    | frozenset(CONSTANTS)
    | frozenset(("\\frac", "\\sqrt", "\\mathbb", "\\angle", "\\triangle", "\\imath"))
)
BEYOND = frozenset("\\int \\iint \\iiint \\sum \\prod \\lim".split())
OPERATORS = frozenset(  # and relations: none of them says anything without what stands before it
    """neg lnot not ne neq notin in ni subset subseteq subsetneq supset supseteq cup cap vee wedge lor land le ge leq geq lt gt
    leqslant geqslant nless ngtr nleq ngeq ll gg approx sim simeq cong equiv asymp doteq propto prec succ preceq succeq mid nmid
    parallel nparallel perp pm mp times div cdot ast star circ bullet oplus otimes setminus smallsetminus backslash to mapsto
    rightarrow leftarrow leftrightarrow gets Rightarrow Leftarrow Leftrightarrow Longrightarrow implies iff forall exists nexists
    over atop choose colon because therefore mod bmod pmod pod prime""".split()
)
MATRICES = frozenset("pmatrix bmatrix matrix smallmatrix Bmatrix array".split())
SYSTEMS = frozenset("cases aligned align gathered split".split())
MAX_PARTS = 2000
MAX_DIGITS = 100_000


def big_int(digits: str) -> int:
    """int() without Python's limit on the number of digits, which is a process-wide setting that this library must not change."""
    if len(digits) <= 4000:
        return int(digits)
    half = len(digits) // 2
    return big_int(digits[:-half]) * 10**half + big_int(digits[-half:])


def number_node(text: str) -> Node:
    """`12`, `1.50`, `.5`, `3.`, `6.02e23`."""
    if len(text) > MAX_DIGITS:
        raise TooDeep(f"a number of {len(text)} digits")
    mantissa, _, exponent = text.lower().partition("e")
    whole, dot, decimals = mantissa.partition(".")
    value = Fraction(big_int(whole or "0")) if not decimals else Fraction(big_int(whole + decimals), 10 ** len(decimals))
    if exponent:
        return Node("num", (), value * Fraction(10) ** int(exponent))
    return Node("dec", (), (value, len(decimals), len((whole + decimals).lstrip("0")))) if dot and decimals else Node("num", (), value)


def repeating(text: str, block: str | None) -> Node:
    r"""`0.1\overline{6}`; with block None, `0.1666...`: the shortest block that ends the digits at least twice (3 digits at least)."""
    whole, _, decimals = text.partition(".")
    if block is None:
        match = re.search(r"(\d+?)\1+$", decimals) if len(decimals) <= 60 else None
        if match is None or len(match[0]) < 3:
            raise Malformed("dots after digits that do not repeat")
        block, decimals = match[1], decimals[: match.start()]
    if len(decimals) + len(block) > 500:
        raise TooDeep("a long repeating decimal")
    fixed = Fraction(int(whole or "0")) + Fraction(int(decimals or "0"), 10 ** len(decimals))
    return Node("num", (), fixed + Fraction(int(block), 10 ** len(decimals) * (10 ** len(block) - 1)))


def signed(sign: str, node: Node) -> Node:
    if sign == "-":
        return Node("neg", (node,))
    return Node("pm", (node,), sign) if sign in ("\\pm", "\\mp") else node


class AtomParser:
    """Tokens with a position, and the rules of the lower half."""

    answer: Callable[[], Node]  # this rule and the next ones are of the upper half
    relation: Callable[[], Node]
    sum: Callable[[], Node]
    power: Callable[[], Node]
    sign: Callable[[], str]
    starts_factor: Callable[[Token, Node], bool]

    def __init__(self, tokens: list[Token], max_depth: int) -> None:
        self.tokens, self.pos, self.depth, self.max_depth = tokens, 0, 0, max_depth
        self.bars = 0  # open |
        self.builder = 0  # open \{, where a | ends the variable
        self.fractions: dict[int, tuple[Node, int]] = {}  # by position: read while looking for a mixed number, with where they end

    def peek(self, ahead: int = 0) -> Token | None:
        i = self.pos + ahead
        return self.tokens[i] if i < len(self.tokens) else None

    def value(self, ahead: int = 0) -> str:
        i = self.pos + ahead
        return self.tokens[i].value if 0 <= i < len(self.tokens) else ""

    def take(self, *values: str) -> bool:
        if self.value() in values and self.peek() is not None:
            self.pos += 1
            return True
        return False

    def need(self, *values: str) -> str:
        found = self.value()
        if found not in values:
            raise Malformed(f"expected {' or '.join(values)}, found {found or 'the end'}")
        self.pos += 1
        return found

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > self.max_depth:
            raise TooDeep(f"nested deeper than {self.max_depth}")

    def atom(self) -> Node:
        self.deeper()
        token = self.peek()
        if token is None:
            raise Malformed("something is missing at the end")
        self.pos += 1
        if token.kind in ("num", "sci"):
            node = self.number(token)
        elif token.kind == "word":
            node = self.word(token)
        elif token.kind == "env":
            node = self.environment(token)
        elif token.value in OPENERS:
            node = self.bracket(token.value)
        elif token.value == "{":
            node = self.braces()
        elif token.value in ("|", "\\vert"):
            node = self.absolute()
        elif token.value in CURRENCIES:
            node = Node("quantity", (signed(self.sign(), self.atom()),), UNITS[CURRENCIES[token.value]])
        elif token.kind == "cmd":
            node = self.command(token.value)
        else:
            raise Malformed(f"{token.value!r} cannot stand here")
        self.depth -= 1
        return node

    def braces(self) -> Node:
        node = self.relation()
        if node.op == "rel":
            raise Malformed("a relation in braces")
        self.need("}")
        return node

    def group(self) -> Node:
        r"""{...} or one token, as LaTeX takes an argument: `\frac12` is one half."""
        token = self.peek()
        if token is None or token.value in ("-", "+", "/", "=", ",", "}", ")", "]", "&"):
            raise Malformed("an argument is missing")
        if self.take("{"):
            return self.braces()
        if token.kind == "num" and token.value.isdigit():
            self.tokens[self.pos : self.pos + 1] = [Token("num", d, token.text, False) for d in token.value]
            self.pos += 1
            return number_node(token.value[0])
        return self.atom()

    def exponent(self) -> Node:
        r"""What stands after ^. Without braces it is one number or atom: x^2\frac{1}{2} is no mixed number above."""
        if self.value() == "{":
            return self.group()
        sign, token = self.sign(), self.peek()
        if token is not None and token.kind == "num":
            self.pos += 1
            return signed(sign, number_node(token.value))
        return signed(sign, self.atom())

    # -- numbers

    def number(self, token: Token) -> Node:
        node = number_node(token.value)
        following = self.peek()
        if following is None:
            return node
        if "." in token.value and following.value in ("\\overline", "\\bar", "\\dot"):
            self.pos += 1
            braced = self.take("{")
            block = self.peek()
            if block is None or not block.value.isdigit():
                raise Malformed("a repeating block must be digits")
            self.pos += 1
            if braced:
                self.need("}")
            return repeating(token.value, block.value)
        if "." in token.value and following.value in DOTS:
            self.pos += 1
            return repeating(token.value, None)
        if following.value == "_" and token.value.isdigit():
            return self.based(token.value)
        if node.op == "num" and (following.value == "\\frac" or (following.kind == "num" and following.space)):
            return self.mixed(node)
        if following.kind == "num":
            raise Malformed("two numbers side by side")
        return node

    def mixed(self, whole: Node) -> Node:
        r"""3\frac{1}{2} and 3 1/2 are mixed numbers when the fraction is a proper one of two integers; 2\frac{x}{3} is a product."""
        start = self.pos
        if self.take("\\frac"):
            top, bottom = self.group(), self.group()
            if top.op == bottom.op == "num" and 0 < top.value < bottom.value:
                return Node("num", (), whole.value + top.value / bottom.value)
            if top.op == bottom.op == "num":
                raise Malformed("a mixed number with an improper fraction")
            self.fractions[start] = (Node("div", (top, bottom)), self.pos)  # read once: nested ones would double the work each time
            self.pos = start
            return whole
        n, d = self.value(), self.value(2)
        if self.value(1) == "/" and n.isdigit() and d.isdigit() and len(n) <= len(d) < 400 and 0 < int(n) < int(d):
            self.pos += 3
            return Node("num", (), whole.value + Fraction(int(n), int(d)))
        raise Malformed("two numbers side by side")

    def based(self, digits: str) -> Node:
        self.need("_")
        base = number_node(self.need(self.value())) if self.value().isdigit() else self.group()  # 12_10: the whole 10
        if base.op != "num" or not 2 <= base.value <= 36 or any(int(d) >= base.value for d in digits) or len(digits) > 500:
            raise Malformed(f"{digits[:20]} is no number in that base")
        return Node("based", (), (digits.lstrip("0") or "0", int(base.value)))

    # -- names

    def word(self, token: Token) -> Node:
        value = token.value
        if value in FUNCTIONS:
            return self.function(value)
        if value in INFINITIES:
            return INFINITY
        if value in ("pi", "Pi"):
            return Node("const", (), "pi")
        if len(value) == 1 or value in GREEK:
            return self.symbol(value)
        if token.text:
            words = [value]
            while (following := self.peek()) is not None and following.kind == "word" and following.text:
                words.append(following.value)
                self.pos += 1
            return self.symbol("text " + " ".join(words).casefold())
        if value in UNITS and value.isalpha():  # a product of letters that happens to spell a unit
            return Node("mul", tuple(self.letter(c) for c in value[:-1]) + (self.symbol(value[-1]),))
        raise Malformed(f"{value!r} is no name in mathematics")

    @staticmethod
    def letter(name: str) -> Node:
        return Node("const", (), name) if name in ("e", "i") else Node("sym", (), name)

    def symbol(self, name: str) -> Node:
        """A name with its subscript."""
        if self.value() != "_":
            return self.letter(name)
        self.pos += 1
        if not self.take("{"):
            token = self.peek()
            if token is None:
                raise Malformed("a subscript is missing")
            self.pos += 1
            return Node("sym", (), f"{name}_{token.value}")
        start, depth = self.pos, 1
        while depth:
            if self.peek() is None:
                raise Malformed("an open subscript")
            depth += {"{": 1, "}": -1}.get(self.value(), 0)
            self.pos += 1
        return Node("sym", (), f"{name}_" + "".join(t.value for t in self.tokens[start : self.pos - 1]))

    def raw_group(self) -> str:
        """The tokens of {...}, or of one token, as a string."""
        if not self.take("{"):
            return self.need(self.value() or "a name")
        start, depth = self.pos, 1
        while depth:
            if self.peek() is None:
                raise Malformed("an open group")
            depth += {"{": 1, "}": -1}.get(self.value(), 0)
            self.pos += 1
        return "".join(t.value for t in self.tokens[start : self.pos - 1])

    def command(self, value: str) -> Node:
        name = value[1:]
        if name in FUNCTIONS and name not in ("sqrt",):
            return self.function(name)
        if value in CONSTANTS:
            return Node("const", (), CONSTANTS[value])
        if name in GREEK:
            return self.symbol(name)
        if value in EMPTY:
            return EMPTY_SET
        if value == "\\frac":
            if found := self.fractions.pop(self.pos - 1, None):
                node, self.pos = found
                return node
            return Node("div", (self.group(), self.group()))
        if value in BINOMIALS:
            return Node("fn", (self.group(), self.group()), "binomial")
        if value == "\\sqrt":
            return self.root()
        if value == "\\mathbb":
            return self.number_set(self.raw_group())
        if value in FENCES:
            close, function = FENCES[value]
            inside = self.sum()
            self.need(close)
            return Node("fn", (inside,), function)
        if value in DECORATIONS or value in ("\\angle", "\\triangle"):
            return Node("sym", (), f"{name} {self.raw_group() if self.value() == '{' else self.letters()}")
        if value in DOTS:
            return Node("sym", (), "...")
        if value in BEYOND:
            if value in ("\\sum", "\\prod", "\\lim") and self.value() != "_":
                raise Malformed(f"{value} over nothing")  # another reader would drop it
            raise Unsupported(f"{value} is not in the grammar")
        if name in OPERATORS or not name.isalpha():
            raise Malformed(f"{value} has nothing before it")
        raise Unknown(f"{value} is not known")

    def number_set(self, letter: str) -> Node:
        r"""\mathbb{R}, and with what narrows it: \mathbb{R}^+, \mathbb{N}^*, \mathbb{R}_{\ge 0}."""
        whole = SETS.get(letter) or Node("sym", (), "set")
        mark, start = self.value(), self.pos
        if mark not in ("^", "_") or letter not in SETS or self.value(1) not in ("+", "-", "*", "{"):
            return whole
        self.pos += 1
        narrowing = _NARROWED.get(self.raw_group())
        if narrowing == "*":
            narrowing = ">0" if letter == "N" else "!=0"
        if narrowing is None:
            self.pos = start  # a power: R^{2}
            return whole
        if letter != "R":
            return Node("sym", (), "ZZ>0" if narrowing == ">0" and letter in "NZ" else whole.value + narrowing)
        zero = Node("num", (), Fraction(0))
        if narrowing == "!=0":
            return Node("minus", (REALS, Node("set", (zero,))))
        ends = (zero, INFINITY) if ">" in narrowing else (Node("neg", (INFINITY,)), zero)
        return Node("tuple", ends, {">0": "()", ">=0": "[)", "<0": "()", "<=0": "(]"}[narrowing])

    def letters(self) -> str:
        start = self.pos
        while (
            (token := self.peek()) is not None and token.kind == "word" and len(token.value) == 1 and (self.pos == start or not token.space)
        ):
            self.pos += 1
        if self.pos == start:
            raise Malformed("a name is missing")
        return "".join(t.value for t in self.tokens[start : self.pos])

    def root(self) -> Node:
        if self.take("["):
            index = self.sum()
            self.need("]")
            return Node("pow", (self.group(), Node("div", (Node("num", (), Fraction(1)), index))))
        if (token := self.peek()) is not None and token.kind == "num":  # \sqrt 12 without braces: the whole number
            self.pos += 1
            return Node("fn", (number_node(token.value),), "sqrt")
        return Node("fn", (self.group(),), "sqrt")

    # -- functions

    def function(self, name: str) -> Node:
        r"""sin x, \sin^2 x, \sin^{-1} x, \log_2 8, \ln(x), max(a, b). Without parentheses the argument is the product that follows."""
        base = power = None
        while self.value() in ("_", "^"):
            if self.take("_"):
                base = self.group()
            else:
                self.pos += 1
                power = self.exponent()
        if power is not None and power == Node("neg", (Node("num", (), Fraction(1)),)) and not name.startswith("a"):
            name, power = f"arc{name}", None
        arguments = self.arguments()
        if name == "log" and base is not None:
            arguments = (*arguments, base)
        elif base is not None:
            raise Unsupported(f"{name} with a subscript")
        node = Node("fn", arguments, name)
        return node if power is None else Node("pow", (node, power))

    def arguments(self) -> tuple[Node, ...]:
        if self.value() in ("(", "\\{", "["):
            inside = self.bracket(self.need("(", "\\{", "["))
            return inside.args if inside.op in ("tuple", "set") else (inside,)
        if self.value() == "{":
            return (self.group(),)
        factors = [self.power()]
        while (token := self.peek()) is not None and token.kind in ("word", "cmd", "num") and not token.text:
            if token.value.lstrip("\\") in FUNCTIONS and token.value != "\\sqrt" or not self.starts_factor(token, factors[-1]):
                break
            factors.append(self.power())
        return (factors[0] if len(factors) == 1 else Node("mul", tuple(factors)),)

    # -- brackets

    def bracket(self, opener: str) -> Node:
        is_set = opener in ("\\{", "\\lbrace")
        closers = (")", "]") if opener in "([" else (OPENERS[opener],)
        if self.take(*closers):
            if is_set:
                return EMPTY_SET
            raise Malformed("empty brackets")
        start, before = self.pos, self.value(-2)
        bars, self.bars = self.bars, 0
        self.builder += is_set
        items = [self.relation()]
        self.builder -= is_set
        if is_set and self.take("|", "\\mid", ":", "\\colon"):
            node = Node("builder", (items[0], self.answer()))
            self.need(*closers)
            self.bars = bars
            return node
        while self.take(",", ";"):
            items.append(self.relation())
            if len(items) > MAX_PARTS:
                raise TooDeep("too many parts")
        closer = self.need(*closers)
        self.bars = bars
        if is_set:
            return Node("set", tuple(items))
        if len(items) > 1:
            if len(items) > 2 and OPENERS[opener] != closer:
                raise Malformed("brackets that do not match")
            return Node("tuple", tuple(items), "()" if opener == "\\langle" else opener + closer)
        if closer == ")" and items[0].op == "rel" and before == "P":  # P(X = 2) is a name
            return Node("sym", (), " ".join(t.value for t in self.tokens[start : self.pos - 1]).replace("=", "is"))
        if OPENERS[opener] != closer or items[0].op == "rel":
            raise Malformed("brackets that do not match")
        return items[0]

    def absolute(self) -> Node:
        self.bars += 1
        inside = self.sum()
        self.need("|", "\\vert")
        self.bars -= 1
        return Node("fn", (inside,), "abs")

    def environment(self, token: Token) -> Node:
        name = token.value[token.value.index("{") + 1 : -1].rstrip("*")
        if not token.value.startswith("\\begin") or name not in MATRICES | SYSTEMS:
            raise (Unsupported if "matrix" in name else Unknown)(f"{token.value} is not in the grammar")
        if name == "array" and self.value() == "{":
            self.raw_group()
        rows: list[list[Node]] = [[]]
        while self.value() != f"\\end{{{name}}}" and self.value().replace(" ", "") != f"\\end{{{name}}}":
            if self.take("\\\\", "\\hline"):
                if rows[-1]:
                    rows.append([])
            elif not self.take("&"):
                rows[-1].append(self.relation())
                if self.value() not in ("&", "\\\\", ",", "\\hline") and not self.value().startswith("\\end"):
                    raise Malformed("a cell that does not end")
                self.take(",")
            if len(rows) > MAX_PARTS:
                raise TooDeep("too many rows")
        self.pos += 1
        rows = [row for row in rows if row]
        if name in SYSTEMS:
            if all(len(row) == 1 for row in rows):
                return Node("list", tuple(row[0] for row in rows), "and")
            raise Unsupported("a piecewise definition")
        if not rows or len({len(row) for row in rows}) != 1:
            raise Malformed("rows of different lengths")
        return Node("matrix", tuple(Node("tuple", tuple(row), "()") for row in rows))
