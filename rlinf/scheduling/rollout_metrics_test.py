from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlinf.data.records import Finish, GroupHeader, Status, Verdict
from rlinf.metrics.names import undocumented
from rlinf.scheduling.rollout_metrics import rollout_metrics

RIGHT = Verdict(5.0, Status.RIGHT, "7", "string", 0.0)
WRONG = Verdict(-5.0, Status.WRONG, "8", "string", 0.0)
NO_BOX = Verdict(-5.0, Status.WRONG, None, "none", 0.0)
UNDECIDED = Verdict(-5.0, Status.UNDECIDED, "x", "timeout", 1.0)


def header(
    name: str, prompt: int, lengths: tuple[int, ...], verdicts: tuple[Verdict | None, ...], finish: Finish = Finish.STOP
) -> GroupHeader:
    n = len(lengths)
    return GroupHeader(
        name, name, "math", prompt, tuple(map(str, range(n))), lengths, lengths, (finish,) * n, tuple(((0, k),) for k in lengths), verdicts
    )


def test_rollout_metrics_of_three_groups() -> None:
    headers = [
        header("a", 10, (1, 3), (RIGHT, RIGHT)),
        header("b", 20, (5, 7), (RIGHT, WRONG)),
        header("c", 30, (9, 11), (NO_BOX, UNDECIDED), Finish.LENGTH),
    ]
    metrics = rollout_metrics(headers, [np.zeros(2), np.array([0.7, -0.7]), np.zeros(2)])
    expected = {
        "rewards": 0.0,
        "accuracy": 0.5,
        "response_length": 6.0,
        "response_length_p50": 6.0,
        "response_length_p95": 10.5,
        "response_length_max": 11.0,
        "prompt_length": 20.0,
        "samples": 6.0,
        "total_tokens": 156.0,
        "truncated": 1 / 3,
        "aborted": 0.0,
        "no_box": 1 / 6,
        "no_answer": 0.0,
        "verdict_undecided": 1 / 6,
        "groups_all_right": 1 / 3,
        "groups_all_wrong": 1 / 3,
        "advantages_mean": 0.0,
        "advantages_max": 0.7,
        "advantages_min": -0.7,
        "advantages_zero": 2 / 3,
    }
    assert metrics == pytest.approx({f"rollout/{k}": v for k, v in expected.items()})
    assert undocumented(metrics) == []


def test_parts_of_the_users_own_have_a_curve_each_and_one_for_all_that_failed() -> None:
    given = replace(RIGHT, parts=(("own/short", 0.5), ("own/steps", 1.0)))
    failed = replace(WRONG, parts=(("own/short", 0.0), ("own/steps", 0.0)), failed=("short", "steps"))
    metrics = rollout_metrics([header("a", 10, (1, 3), (given, failed))])
    own = {name: value for name, value in metrics.items() if "own" in name}
    assert own == {"rollout/reward_own/short": 0.25, "rollout/reward_own/steps": 0.5, "rollout/own_parts_failed": 0.5}
    assert undocumented(metrics) == []


def test_a_missing_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="no verdict yet"):
        rollout_metrics([header("a", 10, (1, 3), (RIGHT, None))])
