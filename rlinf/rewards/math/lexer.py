"""Tokens of a cleaned answer. Linear; text groups are flattened into words that are never products of letters."""

from __future__ import annotations

import re
from typing import NamedTuple

from rlinf.rewards.math.forms import Malformed
from rlinf.rewards.math.units import MULTIPLIERS, UNITS

FUNCTIONS = frozenset(
    """sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc asin acos atan sinh cosh tanh coth sech csch arcsinh arccosh
    arctanh ln log lg exp sqrt cbrt abs floor ceil min max gcd lcm sgn arg Re Im""".split()
)
GREEK = frozenset(
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi
    omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar""".split()
)
INFINITIES = frozenset("infinity inf oo infty".split())
WORDS = (
    FUNCTIONS
    | GREEK
    | INFINITIES
    | frozenset(MULTIPLIERS)
    | frozenset(k for k in UNITS if k.isalpha() and len(k) > 1)
    | frozenset("and or pi mod percent percentage pct deg degree degrees per base".split())
)

_TEXT = frozenset(
    (
        "\\text",
        "\\textbf",
        "\\textit",
        "\\textrm",
        "\\textnormal",
        "\\texttt",
        "\\textsf",
        "\\mbox",
        "\\mathrm",
        "\\operatorname",
        "\\hbox",
        "\\rm",
    )
)
_STYLE = frozenset(
    (
        "\\mathbf",
        "\\mathit",
        "\\boldsymbol",
        "\\bm",
        "\\mathsf",
        "\\mathcal",
        "\\mathscr",
        "\\mathfrak",
        "\\emph",
        "\\underline",
        "\\ensuremath",
        "\\mathnormal",
        "\\pmb",
        "\\mathop",
    )
)
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<sci>[0-9]+(?:\.[0-9]+)?[eE][-+]?[0-9]{1,4}(?![\w.]))|(?P<num>[0-9]+(?:\.(?!\.)[0-9]*)?|\.[0-9]+)|(?P<env>\\(?:begin|end)\s*\{[A-Za-z]+\*?\})"
    r"|(?P<cmd>\\[A-Za-z]+\*?|\\.)|(?P<word>[^\W\d_]+)|(?P<op>\*\*|<=|>=|!=|==|->|\.\.\.|.)",
    re.DOTALL,
)


class Token(NamedTuple):
    """kind: num, sci, env, cmd, word or op. text: inside a text group. space: white space stands before it."""

    kind: str
    value: str
    text: bool
    space: bool


def lex(s: str, text: bool = False, depth: int = 0) -> list[Token]:
    tokens: list[Token] = []
    pos, space = 0, False
    while pos < len(s):
        match = _TOKEN.match(s, pos)
        assert match and match.lastgroup  # one of the groups takes any character
        kind, value = match.lastgroup, match[0]
        pos = match.end()
        if kind == "space":
            space = True
            continue
        if kind == "cmd" and value.rstrip("*") in _TEXT and (end := _group_end(s, pos)):
            if depth > 20:
                raise Malformed("text groups nested too deep")
            start = s.index("{", pos)
            inner = lex(s[start + 1 : end - 1], True, depth + 1)
            tokens += [t._replace(space=t.space or space) if i == 0 else t for i, t in enumerate(inner)]
            pos, space = end, True
            continue
        if kind == "cmd" and value in _STYLE:
            continue
        if (
            kind == "word" and not text and 1 < len(value) and value not in WORDS and (len(value) < 4 or value.isupper())
        ):  # a product of letters
            tokens += [Token("word", letter, False, space and i == 0) for i, letter in enumerate(value)]
        else:
            tokens.append(Token(kind, value, text, space))
        space = False
    return tokens


def _group_end(s: str, pos: int) -> int:
    """Where the brace group that starts at pos (after white space) ends; 0 when there is none."""
    while pos < len(s) and s[pos] == " ":
        pos += 1
    if pos >= len(s) or s[pos] != "{":
        return 0
    depth = 0
    for i in range(pos, len(s)):
        if s[i] in "{}" and s[i - 1] != "\\":
            depth += 1 if s[i] == "{" else -1
            if depth == 0:
                return i + 1
    return 0
