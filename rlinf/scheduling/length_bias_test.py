"""The length bias: exact where all lengths are known, an estimate that sees what is still being generated, 0 where nobody overtakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.scheduling.length_bias import LengthBias
from rlinf.scheduling.staleness import Ledger


def test_long_answers_that_are_out_count_before_they_are_done() -> None:
    """a and c are out at second 2: each is expected to be at least as long as the longest that has ended."""
    bias = LengthBias(window=4)
    for name in "abcd":
        bias.begin(name, 0.0)
    bias.finish("b", 1.0, 1.0)
    bias.finish("d", 4.0, 2.0)
    assert bias.train([1.0, 4.0], 2.0) == pytest.approx((5 - (4 + 1)) / (4 + 1))  # of a (4, expected) and b
    for name in "ef":
        bias.begin(name, 2.0)
        bias.finish(name, 2.0, 3.0)
    assert bias.train([2.0, 2.0], 4.0) == pytest.approx((9 - (4 + 1 + 4 + 4)) / 13)
    bias.finish("a", 9.0, 9.0)
    bias.finish("c", 5.0, 9.0)
    assert bias.train([9.0, 5.0], 9.0) == pytest.approx((2 + 2 + 9 + 5 - (5 + 4 + 2 + 2)) / (5 + 4 + 2 + 2))  # the first two of each left


def test_the_product_limit_estimate() -> None:
    """Three groups took 1, 2 and 2.2 seconds, two have been out for 2.5 seconds, one was begun just now."""
    bias = LengthBias(window=1)
    for name in "abcde":
        bias.begin(name, 0.0)
    for name, seconds, length in (("a", 1.0, 10.0), ("b", 2.0, 20.0), ("c", 2.2, 60.0)):
        bias.finish(name, length, seconds)
    bias.begin("f", 2.5)
    found = bias.expected(2.5)
    # d and e take longer than all that have ended: they count like the longest of those
    assert found["d"] == found["e"] == 60.0
    # f, which is new: one of 5 that were followed to the end of a's second takes 1 s, one of the 4 others 2 s, one of the other 3 2.2 s
    assert found["f"] == pytest.approx(10 / 5 + 4 / 5 * (20 / 4 + 3 / 4 * (60 / 3 + 2 / 3 * 60)))
    assert [found[name] for name in "abc"] == [10.0, 20.0, 60.0]
    bias.finish("d", 200.0, 7.0)
    assert bias.expected(7.0)["e"] == 200.0


def test_nothing_trained_on_has_no_bias() -> None:
    assert LengthBias(4).train([], 0.0) == 0.0


@settings(max_examples=100)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**32 - 1), st.floats(0, 0.5))
def test_the_window_holds_all_that_can_be_overtaken(size: int, eta: int, seed: int, drops: float) -> None:
    """Whatever the order in which groups end: one that is out is in the window, the state survives a file, and the value is that of the
    lists written out, where the lengths of all are known."""
    rng = np.random.default_rng(seed)
    ledger, bias = Ledger(size, eta), LengthBias((eta + 1) * size)
    order: list[str] = []  # those that were not dropped, as they were begun
    running: list[str] = []
    taken: list[str] = []
    length: dict[str, float] = {}
    now = 0.0
    for version in range(12):
        while True:
            for _ in range(ledger.room(version)):
                name = str(len(length))
                length[name] = float(rng.integers(1, 100))
                ledger.begin(name, version), bias.begin(name, now)
                order.append(name), running.append(name)
            if (batch := ledger.take(version)) is not None:
                break
            name, now = running.pop(int(rng.integers(len(running)))), now + 1
            if rng.random() < drops:
                ledger.drop(name), bias.drop(name), order.remove(name)
            else:
                ledger.finish(name), bias.finish(name, length[name], now)
        taken += batch
        kept = json.loads(json.dumps(bias.state(now)))
        found = bias.train([length[name] for name in batch], now)
        again = LengthBias((eta + 1) * size)
        again.restore(kept, now + 50)
        assert again.train([length[name] for name in batch], now + 50) == found
        window = slice(max(0, len(taken) - (eta + 1) * size), len(taken))
        assert set(running) <= set(bias.begun) and list(bias.begun)[: window.stop - window.start] == order[window]
        if not set(running) & set(order[window]):
            trained, begun = (sum(length[name] for name in names[window]) for names in (taken, order))
            assert found == pytest.approx(trained / begun - 1)
        if not eta:
            assert found == pytest.approx(0.0)
