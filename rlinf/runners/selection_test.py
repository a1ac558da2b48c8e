"""What a step learns from: dynamic sampling on a fake engine, and which responses are trained on."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.algorithms.advantages import grpo
from rlinf.config.algorithm import AlgorithmConfig
from rlinf.data.records import Finish, GroupHeader, Status, Verdict
from rlinf.data.sampler import PromptSampler
from rlinf.errors import UserError
from rlinf.runners.selection import StepBatch, counted_tokens, group_advantages, next_groups, trained_samples

RIGHT, WRONG = Verdict(5.0, Status.RIGHT, "7", "string", 0.0), Verdict(-5.0, Status.WRONG, "8", "string", 0.0)
DYNAMIC = AlgorithmConfig(dynamic_sampling=True)


def header(name: str, right: list[bool], finishes: list[Finish] | None = None, lengths: list[int] | None = None) -> GroupHeader:
    n = len(right)
    lengths = lengths or [5] * n
    return GroupHeader(
        name, name, "math", 4, tuple(f"{name}/{i}" for i in range(n)), tuple(lengths), tuple(lengths), tuple(finishes or [Finish.STOP] * n),
        tuple(((0, k),) for k in lengths), tuple(RIGHT if r else WRONG for r in right),
    )  # fmt: skip


def step_of(sampler: PromptSampler, algorithm: AlgorithmConfig, mixed: set[int]) -> StepBatch:
    """One step on an engine whose answers to the prompts of `mixed` are right and wrong, to odd ones all right, to even ones all wrong."""

    async def generate(indices: list[int]) -> list:
        return [(header(str(i), [True, False] if i in mixed else [bool(i % 2)] * 2), None) for i in indices]

    return asyncio.run(next_groups(sampler, algorithm, generate))


@settings(deadline=None)
@given(st.integers(4, 30), st.integers(1, 4), st.integers(1, 9), st.sets(st.integers(0, 29), min_size=1), st.integers(1, 4))
def test_every_prompt_is_trained_on_or_filtered_once_an_epoch(n: int, batch: int, size: int, mixed: set[int], steps: int) -> None:
    """Whatever the size of the generated batches: the steps are cut from one stream of prompts, in its order, without a gap."""
    mixed = {i for i in mixed if i < n} or {0}
    sampler, plain = PromptSampler(n, batch, True, 1), PromptSampler(n, 1, True, 1)
    algorithm = replace(DYNAMIC, dynamic_sampling_batch_size=size, dynamic_sampling_max_batches=1000)
    for _ in range(steps):
        found = step_of(sampler, algorithm, mixed)
        assert len(found.scored) == batch
        used = int(found.metrics["rollout/prompts_used"])
        stream = [i for _ in range(used) for i in plain.next_batch()]
        assert [int(h.group_id) for h in found.generated[:used]] == stream
        assert [int(h.group_id) for h, _ in found.scored] == [i for i in stream if i in mixed]
        assert stream[-1] in mixed and sampler.handed_out == plain.handed_out
        assert found.metrics["rollout/prompts_filtered"] == used - batch
        assert found.metrics["rollout/prompts_generated"] == len(found.generated) < used + size


def test_without_dynamic_sampling_a_step_is_a_batch() -> None:
    found = step_of(PromptSampler(9, 3, False, 1), AlgorithmConfig(), set())
    assert [h.group_id for h, _ in found.scored] == ["0", "1", "2"] == [h.group_id for h in found.generated] and found.metrics == {}


def test_too_few_mixed_groups_are_an_error_that_says_why() -> None:
    with pytest.raises(UserError, match=r"3 batches of 4 prompts gave only 2 of 4 groups .*\(5 were all right, 5 all wrong\)"):
        step_of(PromptSampler(12, 4, False, 1), replace(DYNAMIC, dynamic_sampling_max_batches=3), {1, 2})


def test_correctness_decides_not_the_shaped_reward() -> None:
    """Right answers of different lengths have different rewards after shaping, and still teach nothing."""
    shaped = header("0", [True, True])
    shaped = replace(shaped, verdicts=(RIGHT, replace(RIGHT, reward=4.5)))

    async def generate(indices: list[int]) -> list:
        return [(shaped, None) for _ in indices]

    with pytest.raises(UserError, match="all right"):
        asyncio.run(next_groups(PromptSampler(4, 1, False, 1), replace(DYNAMIC, dynamic_sampling_max_batches=2), generate))


def test_overlong_filtering_leaves_cut_responses_out_of_loss_and_whitening_but_not_out_of_the_baseline() -> None:
    h = header("a", [True, False, False, False], [Finish.STOP, Finish.LENGTH, Finish.WINDOW, Finish.STOP], [2, 9, 9, 3])
    on, off = AlgorithmConfig(overlong_filtering=True), AlgorithmConfig()
    assert counted_tokens(h, off) == [2, 9, 9, 3] and counted_tokens(h, on) == [2, 0, 0, 3]
    assert trained_samples([h], off, 0)[0].all() and trained_samples([h], on, 0)[0].tolist() == [True, False, False, True]
    plain = replace(on, normalize_advantages=False)
    assert group_advantages([h], plain)[0] == pytest.approx(grpo(np.array([5.0, -5, -5, -5])))
    white = group_advantages([h], on)[0][[0, 3]]  # of the tokens that count: mean 0, variance 1
    assert 2 * white[0] + 3 * white[1] == pytest.approx(0) and 2 * white[0] ** 2 + 3 * white[1] ** 2 == pytest.approx(5, abs=1e-3)


def test_an_update_on_a_subset_keeps_the_group_advantages_all() -> None:
    """n = 1 of G = 4: advantages [1.5, -0.5, -0.5, -0.5] stay, one response is trained on; n = G: all of them."""
    h = header("3.p", [True, False, False, False])
    one, four = (AlgorithmConfig(num_update_sample_per_prompt=n, normalize_advantages=False) for n in (1, 4))
    assert group_advantages([h], one)[0] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert [int(trained_samples([h], a, 7)[0].sum()) for a in (one, four, replace(one, num_update_sample_per_prompt=9))] == [1, 4, 4]
    white = AlgorithmConfig(num_update_sample_per_prompt=1)
    assert group_advantages([h], white)[0] == pytest.approx(group_advantages([h], AlgorithmConfig())[0])
    headers = [header(f"{k}.p", [True, False]) for k in range(40)]
    again = [trained_samples(headers[::-1], one, 7)[::-1], trained_samples(headers, one, 7), trained_samples(headers, one, 8)]
    assert np.array_equal(again[0], again[1]) and not np.array_equal(again[1], again[2])  # by group and seed, in any order


def test_token_level_advantages_are_not_whitened_on_the_driver() -> None:
    h = header("a", [True, False], lengths=[2, 3])
    raw = AlgorithmConfig(adv_type="reinforce++", gamma=0.9)
    assert group_advantages([h], raw)[0].tolist() == [5, -5]
    assert group_advantages([h], replace(raw, gamma=1.0))[0] == pytest.approx([1.2247, -0.8165], abs=1e-4)
