"""The bookkeeping of groups that run ahead: bounds, dead-lock, starvation, whatever the order in which groups are done."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.scheduling.staleness import Ledger


@pytest.mark.parametrize(("version", "eta", "most"), [(0, 0, 4), (1, 0, 8), (0, 1, 8), (1, 1, 12), (0, 4, 20)])
def test_as_many_groups_are_begun_as_the_rule_admits(version: int, eta: int, most: int) -> None:
    """floor((N_r - 1) / B) <= i + eta with B = 4 (arXiv 2505.24298, section 4.1)."""
    ledger = Ledger(4, eta)
    for i in range(ledger.room(version)):
        ledger.begin(str(i), version)
    assert ledger.begun_and_kept == most and ledger.room(version) == 0


@settings(max_examples=200)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**32 - 1), st.floats(0, 0.5))
def test_every_group_is_trained_on_once_in_time_or_dropped(size: int, eta: int, seed: int, drops: float) -> None:
    """Groups end in any order, some teach nothing: no step waits for ever, none is stale beyond eta, none is lost."""
    rng, ledger = np.random.default_rng(seed), Ledger(size, eta)
    born: dict[str, int] = {}
    running: list[str] = []
    taken: list[str] = []
    for version in range(30):
        while True:
            for _ in range(ledger.room(version)):
                born[name := str(len(born))] = version
                ledger.begin(name, version)
                running.append(name)
            if (batch := ledger.take(version)) is not None:
                break
            assert running, "the step waits for nothing: dead-lock"
            name = running.pop(int(rng.integers(len(running))))
            if rng.random() < drops:
                ledger.drop(name)
            else:
                ledger.finish(name)
            if rng.random() < 0.1:
                ledger.restore(json.loads(json.dumps(ledger.state())))
        assert len(batch) == size == len(set(batch)) and batch == sorted(batch, key=int)
        assert all(0 <= version - born[name] <= eta for name in batch)
        taken += batch
    assert len(taken) == len(set(taken)) == 30 * size


def test_without_staleness_it_is_the_synchronous_loop() -> None:
    ledger = Ledger(2, 0)
    for name in "ab":
        ledger.begin(name, 0)
    ledger.finish("b")
    assert ledger.take(0) is None
    ledger.finish("a")
    assert ledger.take(0) == ["a", "b"] and ledger.room(0) == 0 and ledger.room(1) == 2
    with pytest.raises(ValueError, match="already"):
        ledger.begin("c", 1), ledger.begin("c", 1)


def test_what_is_due_goes_first_and_is_waited_for() -> None:
    ledger = Ledger(2, 1)
    for name in "abcd":
        ledger.begin(name, 0)
    for name in "bd":
        ledger.finish(name)
    assert ledger.take(0) == ["b", "d"]  # nothing is due at version 0
    for name in "ef":
        ledger.begin(name, 1)
        ledger.finish(name)
    assert ledger.take(1) is None  # a and c were begun under version 0
    ledger.finish("c")
    assert ledger.take(1) is None
    ledger.finish("a")
    assert ledger.take(1) == ["a", "c"]
