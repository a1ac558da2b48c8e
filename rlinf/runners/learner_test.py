"""Scores of a token reward model become part of the rewards that advantages are made of."""

from __future__ import annotations

import numpy as np
import pytest

from rlinf.config.algorithm import AlgorithmConfig
from rlinf.data.records import Finish, GroupHeader, Status, Verdict
from rlinf.runners.learner import with_scores
from rlinf.runners.selection import group_advantages

RIGHT, WRONG = Verdict(1.0, Status.RIGHT, "7", "string", 0.0), Verdict(-1.0, Status.WRONG, "8", "string", 0.0)


def header(right: list[bool]) -> GroupHeader:
    n = len(right)
    verdicts = tuple(RIGHT if r else WRONG for r in right)
    return GroupHeader(
        "a", "a", "math", 4, tuple(f"a/{i}" for i in range(n)), (5,) * n, (5,) * n, (Finish.STOP,) * n, (((0, 5),),) * n, verdicts
    )


def test_a_score_joins_the_reward_with_its_weight_and_the_groups_baseline() -> None:
    """Rewards 1, -1, -1, -1 and scores 0, 4, 0, 0 with weight 0.5: 1, 1, -1, -1, whose advantages are 0.866 and -0.866."""
    scores = {"a/0": 0.0, "a/1": 4.0, "a/2": 0.0, "a/3": 0.0}
    found = with_scores(header([True, False, False, False]), scores, 0.5)
    assert found.rewards == (1.0, 1.0, -1.0, -1.0) and [v.status for v in found.verdicts] == [Status.RIGHT, *[Status.WRONG] * 3]
    (advantages,) = group_advantages([found], AlgorithmConfig(normalize_advantages=False))
    assert advantages == pytest.approx(np.array([0.866, 0.866, -0.866, -0.866]), abs=1e-4)
