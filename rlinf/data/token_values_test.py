"""What training saw of each token, on disk."""

from __future__ import annotations

import json
import math

import numpy as np

from rlinf.data.records import Finish, GroupHeader
from rlinf.data.token_values import RANDOM_SAMPLES, TokenValues, decode, encode, plan_dump


def test_a_byte_keeps_sign_and_size_within_eight_percent() -> None:
    values = np.concatenate([np.logspace(-6, 1, 500), -np.logspace(-6, 1, 500)])
    assert np.abs(decode(encode(values)) / values - 1).max() < 0.08
    assert decode(encode(np.array([0.0, 1e-9, np.nan, 50.0, -np.inf]))).tolist()[:2] == [0.0, 0.0]
    assert math.isnan(decode(encode(np.array([np.nan])))[0])
    assert np.allclose(decode(encode(np.array([50.0, -np.inf]))), [10.0, -10.0])


def test_a_line_has_the_numbers_of_the_sample_and_the_bytes_of_its_tokens() -> None:
    values = TokenValues("g/0", np.array([1.5, 1.5, np.nan]), np.array([0.0, 0.1, np.nan]), np.array([-0.2, 0.1, np.nan]))
    row = json.loads(values.line(["a", "<b>", ""]))
    assert row["sample_id"] == "g/0" and row["advantage"] == 1.5 and row["pieces"] == ["a", "<b>", ""]
    assert row["gap_mean"] == 0.15 and row["gap_max"] == 0.2 and abs(row["ratio_mean"] - (1 + math.exp(0.1)) / 2) < 1e-3
    assert decode(row["gaps"])[0] < 0 < decode(row["gaps"])[1] and math.isnan(decode(row["gaps"])[2])
    assert set(json.loads(values.line())) == {"sample_id", "advantage", "gap_mean", "gap_max", "ratio_mean"}


def test_a_sample_without_a_known_token_is_still_json() -> None:
    nothing = np.full(2, np.nan)
    assert json.loads(TokenValues("g/0", nothing, nothing, nothing).line())["advantage"] is None


def header(group: int, n: int) -> GroupHeader:
    names = tuple(f"g{group}/{i}" for i in range(n))
    return GroupHeader(f"g{group}", "p", "math", 3, names, (4,) * n, (4,) * n, (Finish.STOP,) * n, (((0, 4),),) * n, (None,) * n)


def test_the_plan_has_the_extremes_and_as_many_others_in_any_batch() -> None:
    headers = [header(g, 8) for g in range(32)]
    advantages = [np.zeros(8) for _ in headers]
    advantages[7][3], advantages[30][0] = 2.0, -2.0
    every = [np.ones(8, bool) for _ in headers]
    plan = plan_dump("x", headers, advantages, every, (1, 2))
    assert {"g7/3", "g30/0"} <= plan.sample_ids and len(plan.sample_ids) <= RANDOM_SAMPLES + 2
    assert plan == plan_dump("x", headers, advantages, every, (1, 2)) != plan_dump("x", headers, advantages, every, (1, 3))


def test_the_plan_names_samples_that_are_trained_on_alone() -> None:
    """What overlong filtering or num_update_sample_per_prompt leaves out has no line that could be written in full."""
    headers = [header(g, 4) for g in range(8)]
    advantages = [np.array([9.0, 1.0, -1.0, -9.0])] * 8
    plan = plan_dump("x", headers, advantages, [np.array([False, True, True, False])] * 8, (1, 2))
    assert {name[-1] for name in plan.sample_ids} == {"1", "2"} and len(plan.sample_ids) >= RANDOM_SAMPLES
    assert plan_dump("x", headers, advantages, [np.zeros(4, bool)] * 8, (1, 2)).sample_ids == frozenset()
