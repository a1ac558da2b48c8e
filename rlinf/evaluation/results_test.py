"""Answers that are plainly the same cast the same vote; a table has a row for each model."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from rlinf.evaluation.metrics import RIGHT
from rlinf.evaluation.results import SetResult, Tally, benchmark_table, compare, score
from rlinf.metrics.summary import wilson
from rlinf.rewards.tasks import name_of


@pytest.mark.parametrize(
    ("task", "same", "other"),
    [
        ("math", ["0.5", "\\frac{1}{2}", "1/2", "$0.50$", "1/2."], "0.51"),
        ("math", ["x+1", "x + 1", "{x+1}"], "x+2"),
        ("choice", ["B", "(b)", "B. 12", "\\text{B}"], "A"),
        ("exact", ["a  b", " a b"], "ab"),
    ],
)
def test_equal_wrong_answers_have_one_name(task: str, same: list[str], other: str) -> None:
    assert len({name_of(task, answer) for answer in same}) == 1
    assert name_of(task, other) != name_of(task, same[0])


def tally(right: np.ndarray) -> Tally:
    zeros = np.zeros_like(right)
    votes = tuple(tuple(RIGHT if r else "7" for r in row) for row in right)
    return Tally(tuple(map(str, range(len(right)))), right, zeros, zeros, zeros, zeros + 5, votes)


def test_scores_do_not_depend_on_the_order_of_samples_or_problems() -> None:
    rng = np.random.default_rng(0)
    right = (rng.random((20, 6)) < 0.4).astype(float)
    shuffled = rng.permuted(right, axis=1)[rng.permutation(20)]
    first, second = score(tally(right)), score(tally(shuffled))
    assert {name: s.value for name, s in first.items()} == pytest.approx({name: s.value for name, s in second.items()})
    assert first["pass@1"].value == pytest.approx(first["avg@6"].value) == pytest.approx(right.mean())


def test_the_table_of_two_models_shows_the_gain_and_its_p_value() -> None:
    rights = {"base": np.zeros((10, 4)), "trained": np.ones((10, 4))}
    results = [SetResult(name, name, 0, "aime24", tally(right), score(tally(right))) for name, right in rights.items()]
    out = io.StringIO()
    Console(file=out, width=200).print(benchmark_table(results))
    row = next(line for line in out.getvalue().splitlines() if "trained" in line)
    assert "+100.0 [+100.0, +100.0]" in row and "0.002" in row  # 2 / 2^10
    versus = compare(*results)
    assert versus["problems_better"] == 10 and versus["p_value"] == 2 / 2**10


def test_a_score_of_0_or_1_on_every_problem_has_wilsons_interval() -> None:
    for n in (1, 4):
        found = {right: score(tally(np.full((8, n), right)))[f"avg@{n}"] for right in (0.0, 1.0)}
        assert found[0.0] == pytest.approx((0, 0, 0.324), abs=1e-3) and found[1.0] == pytest.approx((1, 0.676, 1), abs=1e-3)
    one = score(tally(np.array([[1.0], [0.0], [0.0], [0.0]])))
    assert one["avg@1"] == one["pass@1"] == pytest.approx(wilson(1, 4)) and one["response_length"] == (5, 5, 5)
    several = score(tally(np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])))
    assert several["avg@2"] != pytest.approx(wilson(1.5, 3)) and several["pass@2"] == pytest.approx(wilson(2, 3))


def test_names_with_brackets_are_shown_as_they_are() -> None:
    right = np.ones((2, 1))
    results = [SetResult(name, name, 0, "set[a]", tally(right), score(tally(right))) for name in ("base[lr=1e-5]", "base[lr=1e-6]")]
    out = io.StringIO()
    Console(file=out, width=200).print(benchmark_table(results))
    assert all(name in out.getvalue() for name in ("set[a]", "base[lr=1e-5]", "base[lr=1e-6]"))
