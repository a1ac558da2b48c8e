"""Scores against closed forms and against counting all draws."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.evaluation.metrics import RIGHT, draw_sizes, g_pass_at_k, maj_at_k, mg_pass_at_k, pass_at_k, stability_size

DRAWS = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (4, 2, 2, 0.83333),
        (4, 1, 2, 0.5),
        (10, 3, 1, 0.3),
        (10, 3, 5, 0.91667),
        (32, 4, 8, 0.70451),
        (32, 1, 8, 0.25),
        (32, 30, 8, 1),
        (32, 0, 8, 0),
    ],
)
def test_pass_at_k_of_known_cases(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-5)


@given(DRAWS)
def test_pass_at_k_is_the_product_form_and_its_limits_hold(draw: tuple[int, int, int]) -> None:
    n, c, k = draw
    product = Fraction(1)
    for i in range(n - c + 1, n + 1):
        product *= 1 - min(Fraction(1), Fraction(k, i))
    assert pass_at_k(n, c, k) == pytest.approx(float(1 - product), abs=1e-12)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert pass_at_k(n, c, n) == (1 if c else 0)
    assert k == n or pass_at_k(n, c, k) <= pass_at_k(n, c, k + 1) + 1e-12
    assert c == n or pass_at_k(n, c, k) <= pass_at_k(n, c + 1, k) + 1e-12


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_and_g_pass_are_means_over_all_draws(right: list[bool], data: st.DataObject) -> None:
    n, c, k = len(right), sum(right), data.draw(st.integers(1, len(right)))
    draws = [sum(d) for d in combinations(right, k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(d > 0 for d in draws) / len(draws))
    for tau in (0.25, 0.5, 0.75, 1.0):
        assert g_pass_at_k(n, c, k, tau) == pytest.approx(sum(d >= tau * k for d in draws) / len(draws))
    assert g_pass_at_k(n, c, k, 0) == pytest.approx(pass_at_k(n, c, k))


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (4, 2, 4, 0),
        (4, 3, 4, 0.5),
        (4, 4, 4, 1),
        (8, 6, 4, 0.5),
        (8, 4, 4, 0.12857),
        (8, 8, 8, 1),
        (8, 6, 8, 0.5),
        (32, 24, 8, 0.50308),
        (32, 16, 8, 0.11809),
    ],
)
def test_mg_pass_of_known_cases(n: int, c: int, k: int, value: float) -> None:
    assert mg_pass_at_k(n, c, k) == pytest.approx(value, abs=1e-5)


VOTES = st.lists(st.sampled_from([RIGHT, RIGHT, "7", "8", "9", None]), min_size=1, max_size=8)


def by_counting(votes: list[object], k: int) -> float:
    """Every draw of k samples, one by one."""
    wins = []
    for drawn in combinations(votes, k):
        counts = Counter(v for v in drawn if v is not None)
        best = [v for v in counts if counts[v] == max(counts.values())]
        wins.append((RIGHT in best) / max(1, len(best)))
    return sum(wins) / len(wins)


@settings(max_examples=200)
@given(VOTES, st.data())
def test_majority_is_the_mean_over_all_draws_and_knows_no_order(votes: list[object], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(votes)))
    assert maj_at_k(votes, k) == pytest.approx(by_counting(votes, k))
    assert maj_at_k(data.draw(st.permutations(votes)), k) == pytest.approx(maj_at_k(votes, k))


def test_majority_of_one_is_the_mean_and_of_all_is_the_vote() -> None:
    votes = [RIGHT, RIGHT, "7", "7", "7", None]
    assert maj_at_k(votes, 1) == pytest.approx(2 / 6)
    assert maj_at_k(votes, 6) == 0
    assert maj_at_k([RIGHT, RIGHT, "7", "7"], 4) == 0.5  # a tie is shared
    assert maj_at_k([RIGHT, None, None, None], 4) == 1  # no answer, no vote
    assert maj_at_k([None, None], 2) == 0


def test_draw_sizes() -> None:
    assert draw_sizes(1) == [1] and draw_sizes(4) == [1, 2, 4] and draw_sizes(32) == [1, 2, 4, 8, 16, 32] and draw_sizes(6) == [1, 2, 4, 6]
    assert [stability_size(n) for n in (1, 2, 4, 6, 32, 48)] == [1, 1, 2, 2, 16, 16]


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)])
def test_impossible_counts_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(n, c, k)
