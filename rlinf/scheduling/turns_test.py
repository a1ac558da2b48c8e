"""The turns of a run follow one another; everything else is refused by name."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from rlinf.errors import RunFailed
from rlinf.scheduling.turns import ENGINES_GIVE, NEXT, Turn, check_turn

START, SYNC, ROLLOUT, TRAIN, SAVE = Turn


def test_a_run_with_a_checkpoint_in_every_step_is_legal() -> None:
    for now, then in pairwise([START, *[SYNC, ROLLOUT, SAVE, ROLLOUT, TRAIN] * 3, SYNC, ROLLOUT]):
        check_turn(now, then)


@pytest.mark.parametrize(("now", "then"), [(a, b) for a, b in product(Turn, Turn) if b not in NEXT[a]])
def test_every_other_order_is_refused_by_name(now: Turn, then: Turn) -> None:
    with pytest.raises(RunFailed, match=f"{then.value} cannot follow {now.value}"):
        check_turn(now, then)


def test_engines_have_weights_whenever_they_generate() -> None:
    """Over all legal orders: whatever gave the weights away is followed by a sync before the next rollout."""
    seen, todo = set(), [(START, True)]
    while todo:
        turn, weights = todo.pop()
        weights = turn is SYNC or (weights and "weights" not in ENGINES_GIVE.get(turn, ()))
        assert weights or turn is TRAIN
        if (turn, weights) not in seen:
            seen.add((turn, weights))
            todo += [(then, weights) for then in NEXT[turn]]
    assert {turn for turn, _ in seen} == set(Turn)
