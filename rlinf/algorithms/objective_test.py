"""The objective: published values of the aggregation modes, independence of the split, equivalences between the methods, NaN safety.

All in float64 unless a test says so. Legend: N response tokens, S samples.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlinf.algorithms.advantages import centred, grpo
from rlinf.algorithms.aggregation import Denominators, token_weights_N
from rlinf.algorithms.importance import CORRECTIONS, Correction
from rlinf.algorithms.losses import LOSSES
from rlinf.algorithms.objective import MetricSums, ObjectiveSettings, ResponseTokens, early_stop, finalize_metrics, policy_objective

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
PPO = ObjectiveSettings("ppo", "token-mean", 0.2, 0.28, None, 0.0, "k3", 0.0, None, 8)
EVERYTHING = replace(PPO, clip_c=3.0, kl_beta=0.3, entropy_bonus=0.1, correction=Correction("token-truncate", 0.0, 1.5))
DECOUPLED = replace(PPO, loss_type="decoupled-ppo", clip_high=0.2, correction=Correction("token-mask", 0.0, 5.0))


def make_batch(lengths: list[int], seed: int = 0, masked: float = 0.2, spread: float = 0.5) -> ResponseTokens:
    """A whole mini-batch of random numbers; `masked` of the tokens do not count and hold NaN wherever they may."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def noise() -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    sample_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    loss_mask_N = torch.rand(n, generator=generator) >= masked
    old_N, logprobs_N = -noise().abs(), -noise().abs()
    hole_N = torch.where(loss_mask_N, 0.0, float("nan"))
    return ResponseTokens(
        logprobs_N=(old_N + spread * (logprobs_N - old_N)),
        entropy_N=noise().abs(),
        old_logprobs_N=old_N,
        rollout_logprobs_N=old_N + 0.3 * noise() + hole_N,
        ref_logprobs_N=old_N + 0.3 * noise(),
        advantages_N=torch.randn(len(lengths), generator=generator, dtype=torch.float64)[sample_N],
        loss_mask_N=loss_mask_N.to(torch.uint8),
        sample_N=sample_N,
        n_samples=len(lengths),
    )


def denominators_of(batch: ResponseTokens) -> Denominators:
    counts_S = torch.zeros(batch.n_samples, dtype=torch.int64).index_add(0, batch.sample_N, batch.loss_mask_N.long())
    return Denominators(tokens=int(counts_S.sum()), samples=int((counts_S > 0).sum()))


def part(batch: ResponseTokens, samples: list[int]) -> tuple[ResponseTokens, Tensor]:
    """The micro-batch of these samples, in this order, and where its tokens stand in the whole batch."""
    where_N = torch.cat([torch.nonzero(batch.sample_N == s).flatten() for s in samples] + [torch.zeros(0, dtype=torch.int64)])
    lengths = [int((batch.sample_N == s).sum()) for s in samples]
    tensors = {k: v[where_N] for k, v in vars(batch).items() if isinstance(v, Tensor)}
    tensors["sample_N"] = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths, dtype=torch.int64))
    return replace(batch, **tensors, n_samples=len(samples)), where_N


def run(batch: ResponseTokens, options: ObjectiveSettings, split: list[list[int]] | None = None) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient with respect to (logprobs, entropy), and metrics, as the sum over micro-batches."""
    denominators = denominators_of(batch)
    loss, gradient, metrics = 0.0, torch.zeros(2, len(batch.logprobs_N), dtype=torch.float64), None
    for samples in [list(range(batch.n_samples))] if split is None else split:
        micro, where_N = part(batch, samples)
        leaves = [micro.logprobs_N.clone().requires_grad_(), micro.entropy_N.clone().requires_grad_()]
        micro_loss, micro_metrics = policy_objective(replace(micro, logprobs_N=leaves[0], entropy_N=leaves[1]), denominators, options)
        micro_loss.backward()
        loss += micro_loss.item()
        for row, leaf in enumerate(leaves):
            gradient[row, where_N] += 0 if leaf.grad is None else leaf.grad
        metrics = micro_metrics if metrics is None else metrics + micro_metrics
    return loss, gradient, finalize_metrics(metrics.sums, metrics.maxima)


def constant(token_losses: list[float], lengths: list[int]) -> ResponseTokens:
    """An on-policy batch whose PPO token losses are the given numbers (advantage = -loss, ratio 1)."""
    n = len(token_losses)
    zero_N = torch.zeros(n, dtype=torch.float64)
    sample_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask_N = torch.ones(n, dtype=torch.uint8)
    return ResponseTokens(
        zero_N, zero_N, zero_N, zero_N, zero_N, -torch.tensor(token_losses, dtype=torch.float64), mask_N, sample_N, len(lengths)
    )


@pytest.mark.parametrize("mode, expected", list(zip(MODES, (10 / 6, 1.5, 5.0, 0.625))))
def test_aggregation_modes_on_the_published_example(mode: str, expected: float) -> None:
    """Token losses [1, 1] and [2, 2, 2, 2], L_max 8; the last mode is the mean over responses."""
    batch = constant([1, 1, 2, 2, 2, 2], [2, 4])
    assert run(batch, replace(PPO, loss_agg_func=mode))[0] == pytest.approx(expected)


def test_token_mean_over_two_ranks_is_not_the_mean_of_means() -> None:
    """Rank 0: 10 tokens of loss 1; rank 1: 30 tokens of loss 2. 70 / 40 = 1.75, not 1.5; times the two ranks, they bring 0.5 and 3.0."""
    batch = constant([1.0] * 10 + [2.0] * 30, [10, 30])
    assert run(batch, PPO, [[0], [1]])[0] == pytest.approx(1.75)
    shares = [policy_objective(part(batch, [rank])[0], denominators_of(batch), PPO)[0].item() for rank in (0, 1)]
    assert [2 * s for s in shares] == pytest.approx([0.5, 3.0])


@st.composite
def batch_and_split(draw: st.DrawFn) -> tuple[ResponseTokens, list[list[int]]]:
    """Samples dealt to up to 2 ranks x 3 micro-batches in any order; some micro-batches empty, some samples fully masked."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    bins = draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    order = draw(st.permutations(range(len(lengths))))
    batch = make_batch(lengths, draw(st.integers(0, 2**20)), masked=draw(st.sampled_from([0.0, 0.3, 0.8])))
    return batch, [[s for s in order if bins[s] == b] for b in range(6)]


@settings(max_examples=100, deadline=None)
@given(batch_and_split(), st.sampled_from(sorted(LOSSES)), st.sampled_from(MODES), st.sampled_from(CORRECTIONS))
def test_loss_gradients_and_metrics_do_not_depend_on_the_split(
    drawn: tuple[ResponseTokens, list[list[int]]], loss_type: str, mode: str, correction: str
) -> None:
    batch, split = drawn
    options = replace(
        EVERYTHING, loss_type=loss_type, loss_agg_func=mode, clip_c=3.0 if LOSSES[loss_type] is LOSSES["ppo"] else None,
        correction=Correction(correction, 0.5, 1.5),
    )  # fmt: skip
    loss, gradient, metrics = run(batch, options)
    split_loss, split_gradient, split_metrics = run(batch, options, split)
    assert np.isfinite(loss)
    assert split_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
    assert torch.allclose(split_gradient, gradient, rtol=1e-12, atol=1e-15)
    assert split_metrics == pytest.approx(metrics, rel=1e-12, abs=1e-14, nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_fully_masked_sample_changes_nothing(mode: str) -> None:
    batch = make_batch([3, 4, 5], masked=0.0)
    without, where_N = part(batch, [0, 2])
    masked = replace(
        batch,
        loss_mask_N=torch.where(batch.sample_N == 1, 0, 1),
        rollout_logprobs_N=torch.where(batch.sample_N == 1, torch.nan, batch.rollout_logprobs_N),
    )
    options = replace(EVERYTHING, loss_agg_func=mode)
    loss, gradient, metrics = run(masked, options)
    expected_loss, expected_gradient, expected_metrics = run(without, options)
    assert loss == pytest.approx(expected_loss, rel=1e-14) and metrics == pytest.approx(expected_metrics, rel=1e-14, nan_ok=True)
    assert torch.allclose(gradient[:, where_N], expected_gradient) and gradient[:, batch.sample_N == 1].abs().sum() == 0


def test_a_micro_batch_in_which_nothing_counts_is_inert_but_connected() -> None:
    batch = make_batch([3], masked=1.0)
    logprobs = batch.logprobs_N.clone().requires_grad_()
    loss, metrics = policy_objective(replace(batch, logprobs_N=logprobs), Denominators(0, 0), EVERYTHING)
    loss.backward()
    assert loss.item() == 0 and (logprobs.grad == 0).all()
    found = finalize_metrics(metrics.sums, metrics.maxima)
    assert (found.pop("train/loss"), found.pop("train/tokens")) == (0, 0) and found.keys() >= {"train/entropy_loss", "train/ratio"}
    assert all(math.isnan(v) for v in found.values())  # means over nothing


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("penalty", ["k1", "k2", "k3"])
def test_gradients_agree_with_finite_differences(mode: str, penalty: str) -> None:
    batch = make_batch([1, 6, 3, 2], seed=3)
    options = replace(EVERYTHING, loss_agg_func=mode, kl_penalty_type=penalty)

    def loss(logprobs_N: Tensor, entropy_N: Tensor) -> Tensor:
        return policy_objective(replace(batch, logprobs_N=logprobs_N, entropy_N=entropy_N), denominators_of(batch), options)[0]

    assert torch.autograd.gradcheck(loss, (batch.logprobs_N.clone().requires_grad_(), batch.entropy_N.clone().requires_grad_()))


def test_first_mini_batch_has_ratio_1_and_the_gradient_of_reinforce() -> None:
    """old_logprobs None: pi_old is pi. With equal lengths the loss value is 0 (advantages sum to 0) while the gradient is not."""
    batch = replace(make_batch([4] * 4, masked=0.0), old_logprobs_N=None)
    advantages_N = torch.from_numpy(grpo(np.array([1.0, 0, 0, 0])))[batch.sample_N]
    loss, gradient, metrics = run(replace(batch, advantages_N=advantages_N), replace(PPO, clip_c=1.5))
    assert loss == pytest.approx(0, abs=1e-15)
    assert torch.allclose(gradient[0], -advantages_N / 16)
    assert (metrics["train/ratio"], metrics["train/clip_fraction"], metrics["train/dual_clip_fraction"], metrics["train/approx_kl"]) == (
        1,
        0,
        0,
        0,
    )


def test_equal_lengths_make_the_modes_multiples_of_each_other() -> None:
    batch = make_batch([5] * 4, masked=0.0)
    mean, seq_mean, seq_sum, norm = (run(batch, replace(PPO, loss_agg_func=m, max_new_tokens=5))[0] for m in MODES)
    assert seq_mean == pytest.approx(mean) and seq_sum == pytest.approx(5 * mean) and norm == pytest.approx(mean)


def test_dr_grpo_over_std_with_equal_lengths_is_grpo() -> None:
    rewards = np.array([1.0, 0, 0, 1, 0])
    batch = make_batch([6] * 5, masked=0.0)
    spread = {
        name: torch.from_numpy(a)[batch.sample_N] for name, a in (("dr", centred(rewards) / rewards.std(ddof=1)), ("grpo", grpo(rewards)))
    }
    dr = run(replace(batch, advantages_N=spread["dr"]), replace(PPO, loss_agg_func="seq-mean-token-sum-norm", max_new_tokens=6))
    base = run(replace(batch, advantages_N=spread["grpo"]), replace(PPO, loss_agg_func="seq-mean-token-mean"))
    assert dr[0] == pytest.approx(base[0], rel=1e-5) and torch.allclose(dr[1], base[1], rtol=1e-5)


def test_dr_grpo_ignores_appended_tokens_of_zero_loss_and_the_sequence_mean_does_not() -> None:
    short, long = constant([1.0, 1.0], [2]), constant([1.0, 1.0, 0.0, 0.0], [4])
    norm, mean = (replace(PPO, loss_agg_func=m) for m in ("seq-mean-token-sum-norm", "seq-mean-token-mean"))
    assert run(short, norm)[0] == run(long, norm)[0]
    assert run(short, mean)[0] != run(long, mean)[0]


def test_dapo_without_clip_higher_is_grpo_with_token_mean_and_cispo_on_policy_too() -> None:
    batch = make_batch([3, 5], spread=0.0)
    symmetric = replace(PPO, clip_high=0.2)
    reference = run(batch, symmetric)
    for options in (PPO, replace(PPO, clip_c=3.0), replace(PPO, loss_type="cispo")):
        assert torch.allclose(run(batch, options)[1], reference[1])


def test_kl_and_entropy_enter_with_their_weights() -> None:
    batch = make_batch([3, 5])
    base, kl, bonus = (run(batch, o) for o in (PPO, replace(PPO, kl_beta=0.5), replace(PPO, entropy_bonus=0.25)))
    assert kl[0] == pytest.approx(base[0] + 0.5 * base[2]["train/kl_loss"])
    assert bonus[0] == pytest.approx(base[0] - 0.25 * base[2]["train/entropy_loss"])
    assert kl[2]["train/loss"] == base[2]["train/loss"] == pytest.approx(base[0])
    with pytest.raises(ValueError, match="reference"):
        run(replace(batch, ref_logprobs_N=None), replace(PPO, kl_beta=0.5))


def test_truncated_importance_sampling() -> None:
    """rho = 3 weighs 2 (C = 2) or 1 (C = 1), rho = 1/3 weighs 1/3; it multiplies the loss of the token (Yao et al. 2025)."""
    batch = constant([1.0, 1.0], [1, 1])
    rho = torch.tensor([3.0, 1 / 3], dtype=torch.float64)
    batch = replace(batch, rollout_logprobs_N=-rho.log())
    for clip, weights in ((2.0, [2, 1 / 3]), (1.0, [1, 1 / 3])):
        loss, gradient, metrics = run(batch, replace(PPO, correction=Correction("token-truncate", 0.0, clip)))
        assert loss == pytest.approx(sum(weights) / 2)
        assert gradient[0].tolist() == pytest.approx([w / 2 for w in weights])
        assert metrics["train/importance_weight_clipped"] == 0.5
    assert metrics["train/importance_weight_mean"] == pytest.approx((3 + 1 / 3) / 2)
    assert (metrics["train/importance_weight_max"], metrics["train/importance_weight_min"]) == pytest.approx((3, 1 / 3))


@pytest.mark.parametrize(
    "behaviour, prox, policy, a, objective, flows, plain",
    [(0.20, 0.25, 0.25, 1, 1.25, True, 1.20), (0.20, 0.25, 0.30, 1, 1.50, None, 1.20), (0.20, 0.25, 0.35, 1, 1.50, False, 1.20),
     (0.20, 0.25, 0.35, -1, -1.75, True, -1.75), (0.25, 0.25, 0.35, 1, 1.20, False, 1.20), (0.01, 0.08, 0.08, 1, 0.0, False, 1.20)],
)  # fmt: skip
def test_decoupled_ppo_published_table(
    behaviour: float, prox: float, policy: float, a: float, objective: float, flows: bool | None, plain: float
) -> None:
    """arXiv 2505.24298 with epsilon 0.2 and cap 5; `plain` is PPO around the behaviour policy. flows None: on the edge of the range."""
    batch = constant([-float(a)], [1])
    logs = {name: torch.tensor([p], dtype=torch.float64).log() for name, p in (("mu", behaviour), ("prox", prox), ("pi", policy))}
    batch = replace(batch, logprobs_N=logs["pi"], old_logprobs_N=logs["prox"], rollout_logprobs_N=logs["mu"])
    loss, gradient, metrics = run(batch, DECOUPLED)
    assert -loss == pytest.approx(objective)
    assert flows is None or bool(gradient[0].item() != 0) == flows
    assert metrics["train/importance_weight_clipped"] == (prox / behaviour > 5)
    assert -run(replace(batch, old_logprobs_N=logs["mu"]), replace(PPO, clip_high=0.2))[0] == pytest.approx(plain)


def test_a_token_beyond_the_cap_stays_in_the_denominator() -> None:
    """w = 8 > 5 beside w = 1, both of loss -1 before the weight: the mean is over two tokens."""
    batch = constant([-1.0, -1.0], [2])
    batch = replace(batch, rollout_logprobs_N=-torch.tensor([8.0, 1.0], dtype=torch.float64).log())
    assert run(batch, DECOUPLED)[0] == pytest.approx(-0.5)


def test_decoupled_ppo_limits() -> None:
    """pi_prox = pi_behaviour: PPO. pi = pi_prox: an importance-weighted policy gradient, never clipped."""
    batch = make_batch([5, 3], masked=0.0)
    same = replace(batch, rollout_logprobs_N=batch.old_logprobs_N)
    ppo, decoupled = run(same, replace(PPO, clip_high=0.2)), run(same, DECOUPLED)
    assert decoupled[0] == ppo[0] and torch.equal(decoupled[1], ppo[1])
    first = run(replace(batch, logprobs_N=batch.old_logprobs_N), DECOUPLED)
    assert torch.allclose(first[1][0], -(batch.old_logprobs_N - batch.rollout_logprobs_N).exp() * batch.advantages_N / 8)
    assert first[2]["train/clip_fraction"] == 0


@pytest.mark.parametrize(
    ("age", "weight", "ratio", "objective", "flows"),
    [(1, 1.0, 1.75, 1.2, False), (2, 1.3229, 1.3229, 1.5875, False), (3, 1.4522, 1.2051, 1.7426, False), (4, 1.5215, 1.1502, 1.75, True)],
)
def test_an_interpolated_proximal_policy(age: int, weight: float, ratio: float, objective: float, flows: bool) -> None:
    """mu = 0.20, pi = 0.35, A = 1, epsilon 0.2. alpha = (age - 1) / age: w = 1.75^alpha, r = 1.75^(1 - alpha);
    a fresh token has pi_prox = mu."""
    logs = {name: torch.tensor([p], dtype=torch.float64).log() for name, p in (("mu", 0.2), ("pi", 0.35))}
    batch = replace(constant([-1.0], [1]), logprobs_N=logs["pi"], old_logprobs_N=logs["mu"], rollout_logprobs_N=logs["mu"])
    loss, gradient, metrics = run(replace(batch, age_N=torch.tensor([float(age)])), DECOUPLED)
    assert -loss == pytest.approx(objective, abs=1e-4) and bool(gradient[0].item() != 0) == flows
    assert (metrics["train/importance_weight_mean"], metrics["train/ratio"]) == pytest.approx((weight, ratio), abs=1e-4)
    if age == 1:
        assert run(batch, replace(PPO, clip_high=0.2))[0] == loss
    assert (
        run(replace(batch, age_N=torch.tensor([4.0])), replace(DECOUPLED, correction=Correction("token-mask", 0.0, 1.5)))[0] == 0
    )  # beyond the cap


def test_interpolation_with_ages_that_differ_does_not_depend_on_the_split() -> None:
    batch = make_batch([3, 5, 2, 4], seed=5)
    batch = replace(batch, age_N=torch.arange(14) % 4 + 1.0)
    loss, gradient, metrics = run(batch, DECOUPLED)
    split_loss, split_gradient, split_metrics = run(batch, DECOUPLED, [[2], [3, 0], [], [1]])
    assert (
        split_loss == pytest.approx(loss, rel=1e-12)
        and torch.allclose(split_gradient, gradient)
        and split_metrics == pytest.approx(metrics, nan_ok=True)
    )


def test_importance_sampling_with_equal_engines_is_no_correction() -> None:
    batch = make_batch([3, 5])
    batch = replace(batch, rollout_logprobs_N=batch.old_logprobs_N)
    off, on = run(batch, PPO), run(batch, replace(PPO, correction=Correction("token-truncate", 0.0, 2.0)))
    assert on[0] == off[0] and torch.equal(on[1], off[1])
    far = replace(batch, rollout_logprobs_N=batch.old_logprobs_N - 0.5)
    assert run(far, replace(PPO, correction=Correction("token-truncate", 0.0, 1e9)))[0] == pytest.approx(run(far, PPO)[0] * np.exp(0.5))


def test_rollout_gap_is_over_the_tokens_the_engine_reported() -> None:
    batch = replace(make_batch([4], masked=0.0), rollout_logprobs_N=torch.zeros(4, dtype=torch.float64))
    batch = replace(batch, rollout_logprobs_N=batch.old_logprobs_N + torch.tensor([0.1, -0.3, torch.nan, 0.0]))
    metrics = run(batch, PPO)[2]
    assert metrics["train/rollout_logprob_gap_mean"] == pytest.approx(0.4 / 3)
    assert metrics["train/rollout_logprob_gap_max"] == pytest.approx(0.3)


def test_a_shift_of_one_position_shows_in_the_gap() -> None:
    batch = make_batch([64], masked=0.0)
    aligned, shifted = (run(replace(batch, rollout_logprobs_N=x), PPO)[2] for x in (batch.old_logprobs_N, batch.old_logprobs_N.roll(1)))
    assert aligned["train/rollout_logprob_gap_max"] == 0 and shifted["train/rollout_logprob_gap_mean"] > 0.1


@pytest.mark.parametrize("field", ["logprobs_N", "old_logprobs_N"])
def test_nan_surfaces_in_the_ratio_and_stops(field: str) -> None:
    batch = make_batch([3, 5], masked=0.0)
    broken = getattr(batch, field).clone()
    broken[2] = torch.nan
    _, metrics = policy_objective(replace(batch, **{field: broken}), denominators_of(batch), PPO)
    assert metrics.sums["ratio"].isnan()
    assert early_stop(metrics.sums["ratio"].item(), metrics.sums["tokens"].item(), 5.0)


def test_early_stop_is_decided_by_the_token_weighted_ratio() -> None:
    """10 tokens of ratio 1 and 2 of ratio 12: 2.83, no stop, though the mean of the two ranks' means is 6.5."""
    assert not early_stop(10 * 1.0 + 2 * 12.0, 12, 5.0)
    assert early_stop(10 * 1.0 + 2 * 12.0, 12, 2.8)
    assert early_stop(float("nan"), 12, 5.0) and early_stop(float("inf"), 12, 5.0) and early_stop(0.0, 0, 5.0)
    assert not early_stop(float("nan"), 12, None)
    assert early_stop(0.0, 0, None)  # nothing counts: nothing is stepped, whatever the limit


def test_metrics_are_reduced_by_two_collectives() -> None:
    _, metrics = policy_objective(make_batch([3, 5]), Denominators(8, 2), EVERYTHING)
    calls: list[int] = []

    def doubled(vector: Tensor) -> Tensor:
        calls.append(vector.numel())
        return 2 * vector

    reduced = metrics.reduced(doubled, lambda v: v)
    assert len(calls) == 1 and calls[0] == len(metrics.sums)
    assert all(reduced.sums[k] == 2 * v for k, v in metrics.sums.items()) and reduced.maxima == metrics.maxima
    assert all(v.dtype == torch.float64 and not v.requires_grad for v in (metrics.sums | metrics.maxima).values())


def test_single_precision_in_gives_a_single_precision_loss() -> None:
    batch = make_batch([3, 5])
    single = replace(batch, **{k: v.float() for k, v in vars(batch).items() if isinstance(v, Tensor) and v.is_floating_point()})
    loss, _ = policy_objective(replace(single, logprobs_N=single.logprobs_N.requires_grad_()), denominators_of(batch), EVERYTHING)
    assert loss.dtype == torch.float32 and loss.requires_grad
    assert loss.item() == pytest.approx(policy_objective(batch, denominators_of(batch), EVERYTHING)[0].item(), rel=1e-5)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="loss_type"):
        replace(PPO, loss_type="nope")
    with pytest.raises(ValueError, match="dual-clip"):
        replace(PPO, clip_c=1.0)
    with pytest.raises(ValueError, match="decoupled-ppo needs"):
        replace(PPO, loss_type="decoupled-ppo")
    with pytest.raises(ValueError, match="loss_agg_func"):
        token_weights_N("nope", torch.zeros(1, dtype=torch.int64), 1, Denominators(1, 1), 1)


def test_metric_keys_depend_on_the_settings_only() -> None:
    for options in (PPO, EVERYTHING):
        full = policy_objective(make_batch([3, 5]), Denominators(8, 2), options)[1]
        empty = policy_objective(make_batch([0]), Denominators(8, 2), options)[1]
        assert isinstance(empty, MetricSums)
        assert (list(full.sums), list(full.maxima)) == (list(empty.sums), list(empty.maxima))
