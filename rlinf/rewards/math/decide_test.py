"""Equivalence: the labelled pairs of pairs.txt, and laws that must hold for every answer."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlinf.rewards.math.decide import judge_caged, judge_cheap

PAIRS = Path(__file__).parent / "pairs.txt"


def labelled_pairs() -> dict[str, list[tuple[str, str, bool]]]:
    """(gold, answer, right) by category."""
    pairs: dict[str, list[tuple[str, str, bool]]] = defaultdict(list)
    category = ""
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            category = line[3:]
        for mark, right in (("  ==  ", True), ("  !=  ", False)):
            if mark in line and not line.startswith("# "):
                gold, answer = line.split(mark)
                pairs[category].append((gold, answer, right))
    return pairs


def status(gold: str, answer: str) -> str:
    return (judge_cheap(answer, (gold,)) or judge_caged(answer, (gold,))).status


LABELLED = labelled_pairs()


@pytest.mark.parametrize("category", LABELLED)
def test_labelled_pairs(category: str) -> None:
    misjudged = [(g, a) for g, a, right in LABELLED[category] if (status(g, a) == "right") is not right]
    assert misjudged == []


def test_there_are_a_few_hundred_pairs_of_each_label() -> None:
    labels = [right for pairs in LABELLED.values() for _, _, right in pairs]
    assert labels.count(True) > 500 and labels.count(False) > 300


def test_every_gold_is_right_against_itself_and_its_label_needs_no_luck() -> None:
    golds = {g for pairs in LABELLED.values() for g, _, right in pairs if right}
    assert [g for g in golds if status(g, g) != "right"] == []


@pytest.mark.parametrize(
    "category", ["expressions with variables", "roots, constants and expressions without variables", "sets", "matrices"]
)
def test_equality_is_symmetric_where_neither_side_is_privileged(category: str) -> None:
    assert [(g, a) for g, a, right in LABELLED[category] if (status(a, g) == "right") is not right] == []


# -- laws

integers = st.integers(-(10**30), 10**30)
small = st.integers(-999, 999)
rationals = st.fractions(max_denominator=10**6)


def frac(x: Fraction) -> str:
    sign = "-" if x < 0 else ""
    return f"{sign}\\frac{{{abs(x.numerator)}}}{{{x.denominator}}}"


@st.composite
def polynomials(draw: st.DrawFn) -> list[int]:
    """Coefficients, lowest first."""
    return draw(st.lists(small, min_size=2, max_size=5).filter(lambda c: any(c[1:])))


def poly(coefficients: list[int], order: list[int]) -> str:
    terms = [f"{coefficients[k]:+d}x^{{{k}}}" for k in order if coefficients[k]]
    return "".join(terms).lstrip("+") or "0"


@given(integers, integers)
def test_integers_are_equal_when_they_are(a: int, b: int) -> None:
    assert (status(str(a), str(b)) == "right") is (a == b)
    assert status(str(a), f"{a:,}") == "right"
    assert status(str(a), str(a + 1)) == "wrong"


@given(rationals, st.integers(2, 50))
def test_rewriting_a_rational_never_changes_the_verdict(x: Fraction, k: int) -> None:
    forms = [
        frac(x),
        f"{x.numerator}/{x.denominator}",
        f"\\frac{{{x.numerator * k}}}{{{x.denominator * k}}}",
        f"\\left({frac(x)}\\right)",
        f"x = {frac(x)}",
    ]
    if x > 1 and x.denominator > 1:
        whole, rest = divmod(x, 1)
        forms.append(f"{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}")
    for form in forms:
        assert status(forms[0], form) == "right"
        assert status(forms[0], frac(x + 1)) != "right"
        assert status(form, frac(-x)) == ("right" if x == 0 else "wrong")


@given(st.integers(-(10**9), 10**9), st.integers(0, 8))
def test_decimals_are_exact(n: int, places: int) -> None:
    x = Fraction(n, 10**places)
    text = f"{'-' if n < 0 else ''}{abs(n) // 10**places}.{abs(n) % 10**places:0{places}d}" if places else str(n)
    assert status(text, frac(x)) == "right"
    assert status(frac(x), text + ("0" if places else ".0")) == "right"
    assert status(text, str(x + Fraction(1, 10**places)) if places else str(n + 1)) != "right"


@given(polynomials(), st.randoms(use_true_random=False), st.integers(-3, 3))
@settings(max_examples=40, deadline=None)
def test_rewriting_a_polynomial_never_changes_the_verdict_and_adding_one_does(c: list[int], random, shift: int) -> None:
    order = list(range(len(c)))
    gold = poly(c, order[::-1])
    random.shuffle(order)
    horner = str(c[-1])
    for k in reversed(c[:-1]):
        horner = f"({horner})x{k:+d}"
    for form in (poly(c, order), horner, f"{gold}{shift:+d}{-shift:+d}"):
        assert status(gold, form) == "right", (gold, form)
        assert status(form, gold) == "right"
        assert status(gold, f"{form}+1") == "wrong"


@given(st.lists(rationals, min_size=1, max_size=6, unique=True), st.randoms(use_true_random=False), rationals)
def test_sets_have_no_order_and_no_repetition(members: list[Fraction], random, other: Fraction) -> None:
    assume(other not in members)
    shuffled = members + [random.choice(members)]
    random.shuffle(shuffled)
    gold = "\\{" + ", ".join(map(frac, members)) + "\\}"
    assert status(gold, "\\{" + ", ".join(f"{x.numerator}/{x.denominator}" for x in shuffled) + "\\}") == "right"
    assert status(gold, "\\{" + ", ".join(map(frac, [*members, other])) + "\\}") == "wrong"
    assert status(gold, "\\{" + ", ".join(map(frac, [other, *members[1:]])) + "\\}") == "wrong"


@given(st.lists(small, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_tuples_have_an_order(members: list[int], random) -> None:
    other = members[:]
    random.shuffle(other)
    gold = f"({', '.join(map(str, members))})"
    assert (status(gold, f"({','.join(map(str, other))})") == "right") is (other == members)


@given(small, small, st.sampled_from(["()", "(]", "[)", "[]"]), st.sampled_from(["()", "(]", "[)", "[]"]))
def test_intervals_know_their_ends(a: int, b: int, left: str, right: str) -> None:
    assume(a < b)
    gold, answer = f"{left[0]}{a}, {b}{left[1]}", f"{right[0]}{a},{b}{right[1]}"
    assert (status(gold, answer) == "right") is (left == right)
    low, high = ("\\le" if bracket in "[]" else "<" for bracket in left)
    inequality = f"{a} {low} x {high} {b}"
    assert status(gold, inequality) == "right"
    assert status(gold, f"{left[0]}{a}, {b + 1}{left[1]}") == "wrong"


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_gets_a_verdict_and_is_not_right_by_chance(text: str) -> None:
    decision = judge_cheap(text, ("271828182845904523",))
    assert decision is None or decision.status in ("wrong", "undecided")


@given(st.text(alphabet="0123456789+-*/^_(){}[]\\|,.=<>xyie! $%'&~fracsqtpm", max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_formula_gets_a_verdict_and_is_right_against_itself_if_it_is_readable(text: str) -> None:
    decision = judge_cheap(text, ("\\frac{271828}{182845}",))
    assert decision is None or decision.status in ("wrong", "undecided")
    again = judge_cheap(text, (text,))
    assert again is None or again.status == "right" or again.route in ("empty", "malformed", "limit", "gold_unreadable")


def test_a_list_of_solutions_is_any_match() -> None:
    assert judge_cheap("2", ("1", "2")).status == "right"
    assert judge_cheap("0.5", ("1", "\\frac{1}{2}")).status == "right"
    assert judge_cheap("3", ("1", "2")).status == "wrong"


def test_a_solution_may_be_a_whole_text_that_ends_in_a_box() -> None:
    assert judge_cheap("7", ("First $3+4$, so the answer is $\\boxed{7}$.",)).status == "right"


def test_an_unreadable_gold_is_undecided_and_only_itself_is_right() -> None:
    assert judge_cheap("\\frac{1}{}", ("\\frac{1}{}",)).status == "right"
    assert status("\\frac{1}{}", "1") == "undecided"


def test_the_route_and_the_normal_forms_are_told() -> None:
    assert judge_cheap("1,000", ("1000",))[:2] == ("right", "number")
    assert judge_cheap(" \\text{east} ", ("\\text{east}",))[:2] == ("right", "string")
    decision = judge_cheap("\\{2, 1\\}", ("\\{1,2\\}",))
    assert decision[:2] == ("right", "structure") and decision.reason == "\\{2, 1\\} against \\{1,2\\}"
    assert judge_caged("\\sqrt{8}", ("2\\sqrt{2}",)).route == "numeric"
    assert judge_caged("\\int_0^1 x\\,dx", ("\\frac{1}{2}",)).route == "math-verify"
    assert judge_cheap("42 is wrong", ("42",)).status == "wrong"
