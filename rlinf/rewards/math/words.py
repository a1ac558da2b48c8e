"""Answers that are not formulas: words, number words, choice letters, clock times, dates, ratios, numbers in a base."""

from __future__ import annotations

import re
from fractions import Fraction

from rlinf.rewards.math.forms import EMPTY_SET, INFINITY, REALS, Malformed, Node
from rlinf.rewards.math.lexer import FUNCTIONS, GREEK, INFINITIES

_UNTEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|operatorname|emph|hbox)\s*\{([^{}]*)\}")
_CLOCK = re.compile(
    r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\s*([ap])?\.?(?:m\.?)?|([0-9]{1,2})\s*([ap])\.?\s?m\.?|([0-9]{1,2}) o'?clock",
    re.IGNORECASE,
)
_RATIO = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:\s*(?::|\\colon)\s*-?[0-9]+(?:\.[0-9]+)?)+")
_RANGE = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?) to (-?[0-9]+(?:\.[0-9]+)?)")
_CHOICE = re.compile(r"(?:\(\s*([A-Ja-j])\s*\)|([A-J])\s*[).:])\s*[.:]?\s*(.*)", re.DOTALL)
_OTHER_LETTER = re.compile(r"\b(?:or|and|not|nor)\b|\([A-Ja-j]\)|(?<![A-Za-z])[A-J][).:]|^\s*[,;&/]|^[A-J]$")
_OPTION = re.compile(r"(?:choice|option|answer)\s+\(?([A-J])\)?", re.IGNORECASE)
_BASED = re.compile(
    r"([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\s*_\s*\{?\s*([0-9]+|two|three|eight|ten|sixteen)\s*\}?"
    r"|([0-9A-Fa-f]+)\s+\(?(?:in\s+)?base[ -]([0-9]+|two|three|eight|ten|sixteen)\)?"
)
_BASES = {"two": 2, "three": 3, "eight": 8, "ten": 10, "sixteen": 16}
_MONTHS = {
    m: i // 2 + 1
    for i, m in enumerate(
        """january jan february feb march mar april apr may may june jun july jul august aug
        september sep october oct november nov december dec""".split()
    )
}
_MONTHS["sept"] = 9
_MONTH_DAY = re.compile(r"([A-Za-z]{3,9})\.? ([0-9]{1,2})(?:st|nd|rd|th)?(?:,? ([0-9]{4}))?")
_DAY_MONTH = re.compile(r"(?:the )?([0-9]{1,2})(?:st|nd|rd|th)?(?: of)? ([A-Za-z]{3,9})\.?(?:,? ([0-9]{4}))?")
_ISO_DATE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
_ORDINAL = re.compile(r"([0-9]+)(?:\^\{?\s*)?(st|nd|rd|th)\}?")
_ONES = {
    w: i
    for i, w in enumerate(
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
        fifteen sixteen seventeen eighteen nineteen""".split()
    )
}
_TENS = {w: 10 * i for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_PARTS = {
    "half": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "hundredth": 100,
}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_NOTHING = frozenset(
    (
        "no solution",
        "no solutions",
        "no real solution",
        "no real solutions",
        "no real roots",
        "none",
        "empty set",
        "there are no solutions",
        "there is no solution",
        "no such solution",
    )
)
_EVERYTHING = frozenset(
    ("all real numbers", "all reals", "all real x", "any real number", "set of all real numbers", "real numbers", "all real values")
)
_UNDEFINED = frozenset(("undefined", "does not exist", "dne", "doesnt exist"))
_TEXT = re.compile(r"[^\W\d_][^\W\d_'\-.,;&/ ]*(?:[ '\-.,;&/]+[^\W\d_]+)*[.!?]?")
_PUNCTUATION = re.compile(r"(?!(?<=[0-9])[./:](?=[0-9])|(?<!\w)-(?=[0-9])|(?<=[0-9])%)[^\w\s]")  # 1/5, -5, 5% keep theirs
_SEPARATOR = re.compile(r"\s*(?:,|;|&)\s*(?:and|or)?\s+|\s*[,;&]\s*|\s+(?:and|or)\s+")


def untext(s: str) -> str:
    """The answer with its text groups opened."""
    for _ in range(4):
        opened = _UNTEXT.sub(r" \1 ", s)
        if opened == s:
            break
        s = opened
    return " ".join(s.replace("\\ ", " ").split()).rstrip(".,;: ")


def special(s: str) -> Node | None:
    """The answer when it is one of this module's kinds; None: it is for the grammar."""
    plain = untext(s)
    if not plain[:1].isalnum() and plain[:1] != "-":
        return None
    folded = fold(plain) if plain[0] != "-" else ""
    if folded in _NOTHING:
        return EMPTY_SET
    if folded in _EVERYTHING:
        return REALS
    if folded in INFINITIES or folded == "positive infinity":
        return INFINITY
    if folded in _UNDEFINED:
        return Node("text", (), "undefined")
    for read in (_clock, _date, _ratio, _based, _ordinal):
        node = read(plain)
        if node is not None:
            return node
    number: int | Fraction | None = number_word(folded)
    if number is None:
        number = _fraction_words(folded)
    if number is not None:
        return Node("num", (), Fraction(number))
    return _text(s, plain)


def choice(s: str) -> tuple[str, str] | None:
    """(letter, rest) of an answer such as `(B)`, `B.`, `(B) 12`, `option B`."""
    plain = untext(s)
    if match := _OPTION.fullmatch(plain):
        return match[1].upper(), ""
    match = _CHOICE.fullmatch(plain)
    if match is None or _OTHER_LETTER.search(match[3]) or re.match(r"[-+*/^=<>_(\[]|\\(?:cdot|times|cup|in|le|ge|div)", match[3]):
        return None
    return (match[1] or match[2]).upper(), match[3]


def fold(text: str) -> str:
    """Case, punctuation and articles do not count in a text answer."""
    text = _PUNCTUATION.sub(" ", text.casefold().replace("\\%", "%").replace("'", "").replace("’", ""))
    words = text.split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def number_word(text: str) -> int | None:
    """`forty two`, `one hundred and five`, `minus three`; None when it is no number."""
    words = [w for w in text.split() if w != "and"]
    sign = 1
    if words and words[0] in ("minus", "negative"):
        sign, words = -1, words[1:]
    if not words or len(words) > 12 or not all(w in _ONES or w in _TENS or w in _SCALES or w == "hundred" for w in words):
        return None
    total = current = 0
    for word, before in zip(words, ["", *words]):
        if word in _SCALES:
            if current == 0:
                return None
            total, current = total + current * _SCALES[word], 0
        elif word == "hundred":
            if not 0 < current < 10:
                return None
            current *= 100
        elif (before in _ONES and word != before) or before in _ONES or (before in _TENS and (word in _TENS or not 0 < _ONES[word] < 10)):
            return None  # "one two" is no number
        else:
            current += _ONES.get(word, _TENS.get(word, 0))
    return sign * (total + current)


def _fraction_words(text: str) -> Fraction | None:
    """`one half`, `three fourths`."""
    top, _, part = text.rpartition(" ")
    bottom, number = _PARTS.get(part.removesuffix("s") if part != "halves" else "half"), number_word(top) if top else None
    return None if bottom is None or number is None else Fraction(number, bottom)


def _clock(s: str) -> Node | None:
    match = _CLOCK.fullmatch(s)
    if match is None:
        return None
    h, m, sec, half, h2, half2, h3 = match.groups()
    hour, half = int(h or h2 or h3), (half or half2 or "").lower()
    if hour > 24 or (half and not 1 <= hour <= 12):
        return None
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return Node("clock", (), (hour, int(m or 0), int(sec or 0), bool(half)))


def _date(s: str) -> Node | None:
    if match := _ISO_DATE.fullmatch(s):
        y, m, d = (int(g) for g in match.groups())
        return Node("date", (), (y, m, d)) if 1 <= m <= 12 and 1 <= d <= 31 else None
    if match := _MONTH_DAY.fullmatch(s):
        name, day, year = match.groups()
    elif match := _DAY_MONTH.fullmatch(s):
        day, name, year = match.groups()
    else:
        return None
    month = _MONTHS.get(name.lower())
    return Node("date", (), (int(year) if year else None, month, int(day))) if month and 1 <= int(day) <= 31 else None


def _ratio(s: str) -> Node | None:
    if len(s) <= 200 and (match := _RANGE.fullmatch(s)):  # a ratio or a range: against another of its kind, the same numbers
        return Node("range", (), (Fraction(match[1]), Fraction(match[2])))
    if ":" in s and "=" in s:  # a : b = 3 : 2
        names, _, s = s.rpartition("=")
        if ":" not in names or any(c.isdigit() for c in re.sub(r"_\{?[0-9]+\}?", "", names)):
            return None
        s = s.strip()
    if not _RATIO.fullmatch(s) or len(s) > 200:
        return None
    return Node("ratio", (), tuple(Fraction(part.strip()) for part in re.split(r":|\\colon", s)))


def _based(s: str) -> Node | None:
    match = _BASED.fullmatch(s)
    if match is None or len(s) > 500:
        return None
    digits, base = (match[1], match[2]) if match[1] else (match[3], match[4])
    base = _BASES.get(base) or int(base)
    if not 2 <= base <= 36 or any(int(d, 16) >= base for d in digits.replace(".", "")):
        return None
    if "." in digits:
        return Node("text", (), f"{digits.upper()}_{base}")
    return Node("based", (), (digits.upper().lstrip("0") or "0", base))


def _ordinal(s: str) -> Node | None:
    match = _ORDINAL.fullmatch(s)
    return Node("num", (), Fraction(int(match[1]))) if match and len(s) < 20 else None


def _text(s: str, plain: str) -> Node | None:
    """Pure words, or a list of them. Letters that may be a product (`xy`) are left to the grammar."""
    if not _TEXT.fullmatch(plain):
        return None
    words = re.findall(r"[^\W\d_]+", plain)
    if any(w in FUNCTIONS or w in GREEK or w in INFINITIES or w == "pi" for w in words):
        return None
    if all(len(w) == 1 for w in words) or (
        len(words) == 1 and "\\" not in s and (len(words[0]) <= 2 or set(words[0]) <= set("xyzabc")) and words[0].isascii()
    ):
        return None
    parts = [p for p in _SEPARATOR.split(plain) if p]
    nodes = [Node("sym", (), p) if len(p) == 1 else text_node(p) for p in parts]
    return nodes[0] if len(nodes) == 1 else Node("list", tuple(nodes), "or" if re.search(r"\bor\b", plain) else ",")


def text_node(s: str) -> Node:
    folded = fold(untext(s))
    if not folded:
        raise Malformed("no words")
    number = number_word(folded)
    return Node("text", (), folded) if number is None else Node("num", (), Fraction(number))
