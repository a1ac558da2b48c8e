"""Rewrites what a model wrote to the LaTeX that the parser reads: look-alikes, spacing, wrappers, thousands separators.

There are no other rewritings than these, and docs/verifier.md lists them. Digits that are not ASCII are never read as digits.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda", "μ": "mu", "ρ": "rho",
    "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega", "Σ": "Sigma", "Φ": "Phi", "η": "eta", "κ": "kappa",
    "ξ": "xi", "ψ": "psi",
}  # fmt: skip
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ",
    "∗": "*", "∕": "/", "⁄": "/", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ",
    "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∉": r"\notin ", "∅": r"\emptyset ", "∖": r"\setminus ", "°": r"^\circ ", "º": r"^\circ ", "′": "'", "″": "''", "’": "'", "‘": "'",
    "“": '"', "”": '"', "，": ",", "；": ";", "：": ":", "（": "(", "）": ")", "【": "[", "】": "]", "｛": "{", "｝": "}",
    "。": ".", "、": ", ", "＝": "=", "＋": "+", "－": "-", "／": "/", "＜": "<", "＞": ">", "％": "%", "～": "~",
    "…": "...", "⟨": r"\langle ", "⟩": r"\rangle ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}", "⅛": r"\frac{1}{8}", "ℓ": "l", "∠": r"\angle ", "∨": r"\lor ", "∧": r"\land ", "→": r"\to ", "⇒": r"\to ",
    "¬": r"\neg ", "∣": "|", "‖": r"\|", "⊂": r"\subset ", "⊆": r"\subseteq ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u3000": " ",
    "\u200b": "", "\u200a": " ", "\ufeff": "", "\u2061": "", "\u2062": "",
}  # fmt: skip
_TABLE = str.maketrans({**_SYMBOLS, **{k: f"\\{v} " for k, v in _GREEK.items()}})
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:! \n]|q?quad|hspace\*?\{[^{}]*\}|thinspace(?![A-Za-z])|enspace(?![A-Za-z])|phantom\{[^{}]*\}|vphantom\{[^{}]*\})|~"
)
_TIGHT_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!)\s*(?=[0-9])")
_DROPPED = re.compile(
    r"\\(?:left|right|middle)(?![A-Za-z])\.?|\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|tt|mathstrut|strut|centering|large|Large|normalsize|small|protect|allowbreak|nobreak)(?![A-Za-z])"
)
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]/-]|\\\\(?=\s*$)")
_COLOR = re.compile(r"\\(?:textcolor|color|colorbox)\s*\{[^{}]*\}")
_FRAC = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_INNER_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_SPACED_DIGITS = re.compile(r"(?<![0-9.,_^])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?!,[0-9])")
_LEAD_IN = re.compile(
    r"\s*(\\(?:text|textbf|mathrm)\s*\{)?\s*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?"
    r"(?:answer|solution)\s*(?:is|:|=)\s*:?\s*(\})?",
    re.IGNORECASE,
)
_DOMAIN = re.compile(
    r"(?P<all>(?:\\text\s*\{\s*)?for\s+(?:all|any|every|each)\s*\}?|\\forall(?![A-Za-z]))?\s*(?P<name>[A-Za-z])\s*"
    r"\\in(?![A-Za-z])\s*(?P<set>(?:\\mathbb\s*)?\{?[NZQRC]\}?\s*(?:\^\{?[*+]\}?|_\{?(?:\\geq?(?![A-Za-z])|>)?\s*[0+]\}?)?)\s*\)?$"
)
_PREFIX = re.compile(r"(?:\\(?:approx|therefore|implies|Rightarrow|Longrightarrow|to|rightarrow|sim)(?![A-Za-z])|=(?!=))\s*")
MAX_BRACES = 40  # braces around everything that are taken off, each with a pass over the text
_PLAIN = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")


class LookAlike(ValueError):
    """Raised for an answer with characters that only look like digits."""


def clean(answer: str) -> str:
    """The answer as plain LaTeX. Raises LookAlike for digits of another script or style."""
    s = answer.strip()
    if _PLAIN.fullmatch(s):
        return s
    if not s.isascii():
        s = _ascii(s)
    s = _TIGHT_COMMA.sub("", s)
    s = _SPACES.sub(lambda m: "" if m[0] == "\\!" else " ", s)
    s = _DELIMITERS.sub(" ", s)
    s = _DROPPED.sub(lambda m: " ", s)
    s = _COLOR.sub(" ", s) if "color" in s else s
    s = _INNER_BOX.sub("", _FRAC.sub(r"\\frac", s))
    if "\\over" in s:
        s = _OVER.sub(r"\\frac{\1}{\2}", s)
    s = _dollars(s)
    if lead_in := _LEAD_IN.match(s):
        group, closed = lead_in.groups()
        s = (group if group and not closed else "") + s[lead_in.end() :]
    s = _without_end(" ".join(s.split())).lstrip(" :")
    while s and (prefix := _PREFIX.match(s)):
        s = s[prefix.end() :]
    for _ in range(MAX_BRACES):
        inner = _unwrapped(s)
        if inner is None:
            break
        s = _without_end(inner.strip())
    return _SPACED_DIGITS.sub(lambda m: m[0].replace(" ", ""), s)


def readings(s: str) -> list[str]:
    """A cleaned answer with its thousands separators joined; and as it stands, where the comma may also separate a list.

    Inside brackets a comma separates, unless commas with a space after them show that this one does not.
    """
    if "," not in s or not _THOUSANDS.search(s):
        return [s]
    if any(c in s for c in "([") or "\\{" in s:
        return [_THOUSANDS.sub(lambda m: m[0].replace(",", ""), s), s] if ", " in s else [s]
    return [_THOUSANDS.sub(lambda m: m[0].replace(",", ""), s), s]


def without_domain(s: str) -> tuple[str, str]:
    r"""(`x=k\pi`, "k in Z") of `x=k\pi, k\in\mathbb{Z}`, and of it in brackets or after "for all"; (s, "") without a domain at the end."""
    match = _DOMAIN.search(s)
    if match is None:
        return s, ""
    head = s[: match.start()].rstrip()
    opened = head.endswith("(")
    if opened is not s.endswith(")"):
        return s, ""
    head = head.removesuffix("(").rstrip(" ,;")
    name = match["name"]
    in_head = re.search(rf"(?<![A-Za-z\\]){name}(?![A-Za-z])", head)
    marked = opened or match["all"] or s[len(head) : match.start()].strip(" ")
    if not in_head or not marked or re.search(r"[<>]|\\(?:l|g|n)(?:t|e|eq|eqslant)(?![A-Za-z])|\\in(?![A-Za-z])", head):
        return s, ""  # of an inequality, the domain is a part of what is said
    return head, f"{name} in {re.sub(r'[^A-Z*+>=0]|mathbb', '', match['set'] or '')}"


def _ascii(s: str) -> str:
    s = _RAISED.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", s)
    s = _LOWERED.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", s)
    s = s.translate(_TABLE)
    if any(not c.isascii() and unicodedata.numeric(c, None) is not None and unicodedata.category(c) != "Lo" for c in s):
        raise LookAlike("digits that are not ASCII")
    return s


def _without_end(s: str) -> str:
    """Without the punctuation at its end; three dots mean something."""
    return s if s.endswith("...") else s.rstrip(" .,;:\\")


def _dollars(s: str) -> str:
    """Math delimiters go; a lone $ before a number is a currency sign."""
    if "$" not in s:
        return s
    kept = s.replace("\\$", "\0")
    if kept.count("$") == 1 and re.match(r"[-+ ]*\$ ?[-+]?[0-9.]", kept):
        kept = kept.replace("$", "\0")
    return kept.replace("$", " ").replace("\0", "\\$ ")


def _unwrapped(s: str) -> str | None:
    """The inside when one plain pair of braces holds everything."""
    if len(s) < 2 or s[0] != "{" or s[-1] != "}":
        return None
    depth = 0
    for i, c in enumerate(s):
        depth += (c == "{") - (c == "}")
        if depth == 0 and i < len(s) - 1:
            return None
    return s[1:-1]
