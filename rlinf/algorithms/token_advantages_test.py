"""Token-level advantages: published values, limits in which they are the outcome advantages, independence of the split over ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlinf.algorithms.advantages import whiten
from rlinf.algorithms.importance import CORRECTIONS, Correction
from rlinf.algorithms.token_advantages import SampledTokens, TokenAdvantageSettings, discounted_sums_N, token_advantages, value_targets

PLAIN = TokenAdvantageSettings(gamma=1.0, kl_beta=0.0, kl_penalty_type="k2", whiten=False, normalize_by=None)
EVERYTHING = TokenAdvantageSettings(
    gamma=0.9, kl_beta=0.2, kl_penalty_type="k3", whiten=True, normalize_by=Correction("token-truncate", 0.0, 1.2)
)


def make(lengths: list[int], seed: int = 0, masked: float = 0.0, dense: bool = False) -> SampledTokens:
    """Random numbers; what does not count holds NaN."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    mask = rng.random(n) >= masked
    hole = np.where(mask, 0.0, np.nan)
    sample = np.repeat(np.arange(len(lengths)), lengths)
    tensor = lambda values: torch.from_numpy(np.asarray(values, dtype=np.float64))
    return SampledTokens(
        tensor(rng.normal(size=len(lengths))[sample]), tensor(-rng.random(n)), tensor(-rng.random(n) + hole), tensor(-rng.random(n) + hole),
        tensor(mask), torch.from_numpy(sample), len(lengths), rewards_N=tensor(rng.normal(size=n)) if dense else None,
    )  # fmt: skip


def part(batch: SampledTokens, samples: list[int]) -> tuple[SampledTokens, Tensor]:
    """The micro-batch of these samples, and where its tokens stand in the whole batch."""
    where_N = torch.cat([torch.nonzero(batch.sample_N == s).flatten() for s in samples] + [torch.zeros(0, dtype=torch.int64)])
    fields = {k: v[where_N] for k, v in vars(batch).items() if isinstance(v, Tensor)}
    lengths = torch.tensor([int((batch.sample_N == s).sum()) for s in samples], dtype=torch.int64)
    fields["sample_N"] = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    return replace(batch, **fields, n_samples=len(samples)), where_N


def alone(batch: SampledTokens, how: TokenAdvantageSettings) -> Tensor:
    return token_advantages([batch], how, lambda t: t)[0]


def test_return_to_go_by_hand() -> None:
    """Outcome 3, log pi - log ref = (0.2, -0.4, 0.6): k1 is that difference, so r = (-0.1, 0.2, 3 - 0.3) with beta 0.5; gamma 0.5."""
    batch = replace(make([3]), outcome_N=torch.full((3,), 3.0, dtype=torch.float64))
    batch = replace(batch, ref_logprobs_N=batch.logprobs_N - torch.tensor([0.2, -0.4, 0.6], dtype=torch.float64))
    how = replace(PLAIN, gamma=0.5, kl_beta=0.5, kl_penalty_type="k1")
    assert alone(batch, how).tolist() == pytest.approx([-0.1 + 0.5 * (0.2 + 0.5 * 2.7), 0.2 + 0.5 * 2.7, 2.7])
    assert alone(batch, replace(how, gamma=1.0)).tolist() == pytest.approx([2.8, 2.9, 2.7])
    k2 = alone(batch, replace(how, gamma=1.0, kl_penalty_type="k2"))
    assert k2.tolist() == pytest.approx([3 - 0.25 * (0.04 + 0.16 + 0.36), 3 - 0.25 * (0.16 + 0.36), 3 - 0.25 * 0.36])


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([1.0, 0.99, 0.5]))
def test_discounted_sums_are_those_of_the_recursion(lengths: list[int], discount: float) -> None:
    sample_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values.clone()
    for t in reversed(range(len(values) - 1)):
        if sample_N[t] == sample_N[t + 1]:
            expected[t] += discount * expected[t + 1]
    assert torch.allclose(discounted_sums_N(values, discount, sample_N), expected, rtol=1e-12, atol=1e-12)


def test_whitening_leaves_a_response_without_signal_at_exactly_zero_where_the_mean_is_only_rounding() -> None:
    batch = replace(make([7] * 5), outcome_N=torch.tensor([0.1, 0.2, -0.3, 0.0, 0.0], dtype=torch.float64).repeat_interleave(7))
    assert batch.outcome_N.sum() != 0  # 0.1 + 0.2 - 0.3 is not, quite
    white = alone(batch, replace(PLAIN, whiten=True))
    assert (white[21:] == 0).all() and (white[:21] != 0).all()


def test_reinforce_pp_whitening_published_example() -> None:
    """Rewards 1 (2 tokens) and 0 (3 tokens): 1.2247 and -0.8165, with the population variance (arXiv 2501.03262)."""
    batch = replace(make([2, 3]), outcome_N=torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64))
    assert alone(batch, replace(PLAIN, whiten=True)).tolist() == pytest.approx([1.2247] * 2 + [-0.8165] * 3, abs=1e-4)


def test_without_kl_and_discount_they_are_the_outcome_advantages() -> None:
    batch = make([3, 1, 7, 4])
    assert torch.equal(alone(batch, PLAIN), batch.outcome_N)
    outcomes = np.array([batch.outcome_N[batch.sample_N == s][0] for s in range(4)])
    white = torch.from_numpy(whiten(outcomes, np.array([3, 1, 7, 4])))[batch.sample_N]
    assert torch.allclose(alone(batch, replace(PLAIN, whiten=True)), white, rtol=1e-12)


def test_equal_advantages_whiten_to_exactly_zero() -> None:
    batch = replace(make([3, 1, 7]), outcome_N=torch.full((11,), 0.1, dtype=torch.float64))
    assert (alone(batch, replace(PLAIN, whiten=True)) == 0).all()
    assert (alone(make([4], masked=1.0), EVERYTHING) == 0).all()


def test_dense_rewards_by_hand() -> None:
    """Outcome 3, token rewards (0.5, -1, 2), gamma 0.5: r = (0.5, -1, 5)."""
    batch = replace(make([3]), outcome_N=torch.full((3,), 3.0, dtype=torch.float64), rewards_N=torch.tensor([0.5, -1.0, 2.0]))
    assert alone(batch, PLAIN).tolist() == [4.5, 4.0, 5.0]
    assert alone(batch, replace(PLAIN, gamma=0.5)).tolist() == [0.5 + 0.5 * 1.5, -1 + 0.5 * 5.0, 5.0]
    assert alone(batch, replace(PLAIN, gamma=0.0)).tolist() == [0.5, -1.0, 5.0]  # a token is credited with its own alone
    with_critic = replace(batch, values_N=torch.tensor([0.2, 0.4, 0.5], dtype=torch.float64))
    assert alone(with_critic, PLAIN).tolist() == pytest.approx([4.3, 3.6, 4.5]) and value_targets([with_critic], PLAIN)[
        0
    ].tolist() == pytest.approx([4.5, 4.0, 5.0])
    gap = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)  # a token that does not count is not paid either
    assert alone(replace(batch, loss_mask_N=gap), PLAIN).tolist() == [5.5, 0.0, 5.0]


def test_tokens_that_do_not_count_are_skipped() -> None:
    """A tool's tokens neither earn, nor pay, nor discount: the others' advantages are as if they were not there."""
    batch = make([9], seed=3, masked=0.4)
    keep = batch.loss_mask_N.bool()
    without = replace(batch, **{k: v[keep] for k, v in vars(batch).items() if isinstance(v, Tensor)})
    found = alone(batch, EVERYTHING)
    assert torch.equal(found[keep], alone(without, EVERYTHING)) and (found[~keep] == 0).all() and not keep.all()


def test_normalised_weights_have_mean_one() -> None:
    """rho = 3 and 1/3 with C = 2: weights 2 and 1/3, mean 7/6; what the loss multiplies by the weight is divided by the mean."""
    batch = replace(make([1, 1]), outcome_N=torch.tensor([1.0, -1.0], dtype=torch.float64))
    batch = replace(batch, rollout_logprobs_N=batch.logprobs_N - torch.tensor([3.0, 1 / 3], dtype=torch.float64).log())
    found = alone(batch, replace(PLAIN, normalize_by=Correction("token-truncate", 0.0, 2.0)))
    assert found.tolist() == pytest.approx([6 / 7, -6 / 7])
    assert alone(batch, replace(PLAIN, normalize_by=Correction("token-mask", 4.0, 5.0))).tolist() == [1, -1]  # nothing left to normalise


def test_missing_log_probabilities_are_refused() -> None:
    batch = make([3])
    with pytest.raises(ValueError, match="reference"):
        alone(replace(batch, ref_logprobs_N=None), EVERYTHING)
    with pytest.raises(ValueError, match="weights"):
        alone(replace(batch, logprobs_N=None), replace(PLAIN, normalize_by=Correction("token-truncate", 0.0, 2.0)))


def on_ranks(shares: list[list[SampledTokens]], how: TokenAdvantageSettings) -> list[list[Tensor]]:
    """Every rank in a thread of its own, adding vectors with the others at the same calls."""
    barrier, slots = Barrier(len(shares)), [torch.zeros(1)] * len(shares)

    def sums(rank: int) -> Callable[[Tensor], Tensor]:
        def all_sum(vector: Tensor) -> Tensor:
            assert vector.dtype == torch.float64
            slots[rank] = vector
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        return all_sum

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(lambda r: token_advantages(shares[r], how, sums(r)), range(len(shares))))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data(), st.sampled_from([0.0, 0.3]), st.sampled_from([1.0, 0.9]), st.booleans(),
    st.sampled_from([None, *CORRECTIONS]),
)  # fmt: skip
def test_they_do_not_depend_on_the_split(
    lengths: list[int], data: st.DataObject, masked: float, gamma: float, white: bool, kind: str | None
) -> None:
    """Samples dealt to 2 ranks x 2 micro-batches in any order; some empty."""
    batch = make(lengths, data.draw(st.integers(0, 999)), masked, dense=data.draw(st.booleans()))
    how = replace(EVERYTHING, gamma=gamma, whiten=white, normalize_by=kind and Correction(kind, 0.5, 1.3))
    whole = alone(batch, how)
    bins = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    order = data.draw(st.permutations(range(len(lengths))))
    micro = [part(batch, [s for s in order if bins[s] == b]) for b in range(4)]
    found = on_ranks([[micro[0][0], micro[1][0]], [micro[2][0], micro[3][0]]], how)
    for (_, where_N), advantages in zip(micro, [a for rank in found for a in rank]):
        assert torch.allclose(advantages, whole[where_N], rtol=1e-11, atol=1e-13)


# ---- with a critic ------------------------------------------------------------------------------------------------------------------


def one_response(values: list[float], reward: float, mask: list[int] | None = None) -> SampledTokens:
    n = len(values)
    tensor = lambda numbers: torch.tensor(numbers, dtype=torch.float64)
    nothing = tensor([torch.nan] * n)
    return SampledTokens(
        tensor([reward] * n), None, nothing, None, tensor(mask or [1] * n), torch.zeros(n, dtype=torch.int64), 1, tensor(values)
    )


@pytest.mark.parametrize(
    ("reward", "lam", "expected"),
    [
        (1.0, 0.95, [0.74625, 0.5750, 0.5000]),
        (1.0, 1.0, [0.8, 0.6, 0.5]),
        (-1.0, 0.95, [-1.05875, -1.3250, -1.5000]),
        (-1.0, 1.0, [-1.2, -1.4, -1.5]),
        (0.0, 0.95, [-0.15625, -0.3750, -0.5000]),
        (0.0, 1.0, [-0.2, -0.4, -0.5]),
    ],
)
def test_generalized_estimate_of_a_finished_response(reward: float, lam: float, expected: list[float]) -> None:
    batch, how = one_response([0.2, 0.4, 0.5], reward), replace(PLAIN, gae_lambda=lam)
    assert alone(batch, how).tolist() == pytest.approx(expected)
    (targets,) = value_targets([batch], how)
    assert targets.tolist() == pytest.approx([a + v for a, v in zip(expected, [0.2, 0.4, 0.5])])


def test_generalized_estimate_with_a_discount_and_kl_in_the_reward() -> None:
    """gamma 0.9, lambda 0.5, reward 1: delta = [0.16, 0.05, 0.5]; A_2 = 0.5, A_1 = 0.05 + 0.45 * 0.5, A_0 = 0.16 + 0.45 * A_1."""
    batch, how = one_response([0.2, 0.4, 0.5], 1.0), replace(PLAIN, gamma=0.9, gae_lambda=0.5)
    assert alone(batch, how).tolist() == pytest.approx([0.28375, 0.275, 0.5])
    kl = torch.tensor([0.2, -0.4, 0.6], dtype=torch.float64)
    batch = replace(batch, logprobs_N=kl - 1, ref_logprobs_N=torch.full((3,), -1.0, dtype=torch.float64))
    paid = alone(batch, replace(how, kl_beta=0.5, kl_penalty_type="k1"))  # delta = [0.06, 0.25, 0.2]
    assert paid.tolist() == pytest.approx([0.06 + 0.45 * (0.25 + 0.45 * 0.2), 0.25 + 0.45 * 0.2, 0.2])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_generalized_estimate_is_the_sum_it_is_defined_as(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    """Sample by sample over the tokens that count, from the definition."""
    batch = make(lengths, seed, masked=0.3)
    batch = replace(batch, values_N=torch.from_numpy(np.random.default_rng(seed).normal(size=sum(lengths))))
    got, how = alone(batch, replace(PLAIN, gamma=gamma, gae_lambda=lam)), gamma * lam
    for s in range(len(lengths)):
        mine = (batch.sample_N == s) & (batch.loss_mask_N == 1)
        n, values = int(mine.sum()), batch.values_N[mine]
        rewards = torch.zeros(n, dtype=torch.float64)
        if n:
            rewards[-1] = batch.outcome_N[mine][-1]
        deltas = rewards + gamma * torch.cat([values[1:], torch.zeros(min(n, 1))]) - values
        expected = [sum(how ** (k - t) * float(deltas[k]) for k in range(t, n)) for t in range(n)]
        assert got[mine].tolist() == pytest.approx(expected, abs=1e-9)
    assert not got[batch.loss_mask_N == 0].any()


def test_without_discount_the_value_target_is_the_reward_and_zero_values_are_reinforce() -> None:
    batch = one_response([0.2, 0.4, 0.5, 9.0], 3.0, mask=[1, 1, 1, 0])
    assert value_targets([batch], PLAIN)[0].tolist() == pytest.approx([3.0, 3.0, 3.0, 0.0])
    zero = replace(batch, values_N=torch.zeros(4, dtype=torch.float64))
    assert alone(zero, replace(PLAIN, gamma=0.9)).tolist() == alone(replace(zero, values_N=None), replace(PLAIN, gamma=0.9)).tolist()
