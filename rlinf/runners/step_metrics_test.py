from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlinf.config.schema import Config
from rlinf.data.records import Finish, GroupHeader, Status, Verdict
from rlinf.metrics.names import undocumented
from rlinf.runners.step_metrics import advantage_metrics, report_metrics, rollout_metrics, staleness_metrics, token_reward_metrics
from rlinf.workers.interfaces import TrainReport

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
    metrics = rollout_metrics(headers) | advantage_metrics(
        [np.zeros(2), np.array([0.7, -0.7]), np.zeros(2)], [np.ones(2, bool)] * 3, Config()
    )
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
    failed = replace(WRONG, parts=(("own/short", 0.0), ("own/steps", 0.0)), failed=(("steps", "KeyError"),))
    metrics = rollout_metrics([header("a", 10, (1, 3), (given, failed))])
    own = {name: value for name, value in metrics.items() if "own" in name}
    shares = {"rollout/own_parts_failed": 0.5, "rollout/reward_own_failed/short": 0.0, "rollout/reward_own_failed/steps": 0.5}
    assert own == {"rollout/reward_own/short": 0.25, "rollout/reward_own/steps": 0.5} | shares
    assert undocumented(metrics) == []


def test_a_missing_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="no verdict yet"):
        rollout_metrics([header("a", 10, (1, 3), (RIGHT, None))])


def test_advantages_are_of_the_responses_that_are_trained_on_and_with_a_critic_not_the_drivers() -> None:
    config, advantages = Config(), [np.array([9.0, 1.0, -1.0])]
    found = advantage_metrics(advantages, [np.array([False, True, True])], config)
    assert found["rollout/advantages_max"] == 1.0 and found["rollout/advantages_mean"] == 0.0
    assert advantage_metrics(advantages, [np.zeros(3, bool)], config) == {}
    config.algorithm.adv_type = "gae"
    assert config.has_critic and advantage_metrics(advantages, [np.ones(3, bool)], config) == {}


def test_scores_of_right_and_of_wrong_answers_are_told_apart() -> None:
    found = token_reward_metrics([header("a", 4, (5, 5, 5), (RIGHT, WRONG, WRONG))], {"0": 3.0, "1": 1.0, "2": -4.0})
    values = {"mean": 0.0, "max": 3.0, "min": -4.0, "right": 3.0, "wrong": -1.5}
    assert found == {f"rollout/token_reward_{name}": value for name, value in values.items()} and undocumented(found) == []
    assert "rollout/token_reward_right" not in token_reward_metrics([header("a", 4, (5,), (WRONG,))], {"0": 1.0})


def test_the_slowest_rank_and_the_largest_memory_count() -> None:
    reports = [TrainReport({"loss": 1.0}, {"time/x": s}, memory_bytes=m << 30) for s, m in ((2.0, 1), (3.0, 4), (1.0, 2))]
    assert report_metrics(reports, "critic") == {"loss": 1.0, "time/x": 3.0, "perf/critic_memory_gib": 4.0}


def report(seconds: float, peak: float = 0.0) -> TrainReport:
    flops = {"recompute_logprobs": 2e12, "forward_backward": 6e12, "again": 1.5e12}
    return TrainReport({"train/loss": 1.0}, {"time/recompute_logprobs": 1.0, "time/forward_backward": seconds}, 2**30, False, flops, peak)


def test_speeds_are_of_one_device_and_of_the_slowest_ranks_seconds() -> None:
    found = report_metrics([report(3.0), report(2.0)], "actor")
    assert found == {
        "train/loss": 1.0, "time/recompute_logprobs": 1.0, "time/forward_backward": 3.0, "perf/actor_memory_gib": 1.0,
        "perf/actor_recompute_tflops": 2.0, "perf/actor_tflops": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(("data_sheet", "key"), [(8e12, None), (99e12, 8.0)])
def test_utilisation_where_the_peak_is_known(data_sheet: float, key: float | None) -> None:
    found = report_metrics([report(3.0, data_sheet)] * 2, "actor", key)
    assert (found["perf/actor_mfu"], found["perf/actor_hfu"], found["perf/actor_recompute_mfu"]) == (0.25, 0.3125, 0.25)
    assert undocumented(found) == []


def test_a_part_that_was_not_run_has_no_speed() -> None:
    idle = TrainReport({}, {"time/values": 1.0}, 0, False, {"values": 0.0, "again": 0.0})
    assert set(report_metrics([idle], "critic")) == {"time/values", "perf/critic_memory_gib"}


def test_staleness_is_counted_in_tokens() -> None:
    versions = (((3, 1), (5, 3)), ((4, 4),), ())
    header = GroupHeader("g", "p", "math", 1, ("a", "b", "c"), (4, 4, 0), (4, 4, 0), (Finish.STOP,) * 3, versions, (None,) * 3)
    assert staleness_metrics([header], 5) == {"rollout/staleness_mean": (2 + 4) / 8, "rollout/staleness_max": 2.0}
    assert staleness_metrics([], 5) == {"rollout/staleness_mean": 0.0, "rollout/staleness_max": 0.0}
