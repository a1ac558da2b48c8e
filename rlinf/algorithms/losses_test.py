"""Published truth tables of the token losses, their gradients by closed form and by finite differences, the KL estimators."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlinf.algorithms.kl import kl_estimate_N
from rlinf.algorithms.losses import LOSSES, Clip, clipped_surrogate, importance_ratio_N

DAPO = Clip(0.2, 0.28)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_and_gradient(name: str, log_ratio: Tensor, advantages: Tensor, sample: list[int], clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses, d(mean over samples of mean over tokens)/d logprobs, and the clipped tokens, at old log-probabilities of -1."""
    old = torch.full_like(log_ratio, -1.0)
    logprobs = (old + log_ratio).requires_grad_()
    sample_N = torch.tensor(sample)
    n_samples = max(sample) + 1
    losses = LOSSES[name](logprobs, old, advantages, sample_N, n_samples, clip)
    lengths = torch.bincount(sample_N)[sample_N]
    (losses.loss_N / lengths).sum().div(n_samples).backward()
    return losses.loss_N.detach(), logprobs.grad, losses.clipped_N


@pytest.mark.parametrize(
    "r, a, plain, dual, flows, flows_dual",
    [(1.5, 1, -1.28, -1.28, False, False), (1.5, -1, 1.5, 1.5, True, True), (0.5, 1, -0.5, -0.5, True, True),
     (0.5, -1, 0.8, 0.8, False, False), (5.0, -1, 5.0, 3.0, True, False)],
)  # fmt: skip
def test_clip_truth_table(r: float, a: float, plain: float, dual: float, flows: bool, flows_dual: bool) -> None:
    """arXiv 2503.14476, epsilon 0.2 / 0.28, dual clip 3."""
    for c, expected, has_gradient in ((None, plain, flows), (3.0, dual, flows_dual)):
        loss, gradient, clipped = loss_and_gradient("ppo", vector(r).log(), vector(a), [0], Clip(0.2, 0.28, c))
        assert loss.item() == pytest.approx(expected)
        assert bool(gradient.item() != 0) == has_gradient
        assert bool(clipped.item()) == (not flows)


@pytest.mark.parametrize("p, symmetric, higher", [(0.01, 0.012, 0.0128), (0.9, 1.08, 1.152)])
def test_clip_higher_gives_unlikely_tokens_more_room(p: float, symmetric: float, higher: float) -> None:
    """arXiv 2503.14476: up to which probability a token of positive advantage still has a gradient."""
    for clip, bound in ((Clip(0.2, 0.2), symmetric), (Clip(0.2, 0.28), higher)):
        for probability, flows in ((0.999 * bound, True), (1.001 * bound, False)):
            _, gradient, _ = loss_and_gradient("ppo", vector(probability / p).log(), vector(1.0), [0], clip)
            assert bool(gradient.item() != 0) == flows


def test_dual_clip_leaves_positive_advantages_alone_and_vanishes_for_large_c() -> None:
    ratio = torch.linspace(0.1, 6, 40, dtype=torch.float64)
    for sign in (1.0, -1.0):
        advantages = torch.full_like(ratio, sign)
        plain = clipped_surrogate(ratio, advantages, DAPO).loss_N
        assert torch.equal(clipped_surrogate(ratio, advantages, Clip(0.2, 0.28, 1e9)).loss_N, plain)
        dual = clipped_surrogate(ratio, advantages, Clip(0.2, 0.28, 3.0))
        assert torch.equal(dual.loss_N, plain if sign > 0 else plain.clamp(max=3.0))
        assert dual.dual_clipped_N.sum() == (0 if sign > 0 else (ratio > 3).sum())


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_gradient_is_reinforce(name: str) -> None:
    """At pi = pi_old nothing is clipped and the gradient of every loss is -A x weight, with any clip and any c."""
    advantages = vector(1.5, 1.5, -0.5, -0.5, -0.5)
    clip = Clip(0.2, 0.28, None if name == "cispo" else 3.0)
    _, gradient, clipped = loss_and_gradient(name, torch.zeros(5, dtype=torch.float64), advantages, [0, 0, 1, 1, 1], clip)
    assert torch.allclose(gradient, -advantages / vector(4, 4, 6, 6, 6))
    assert not clipped.any()


def test_gspo_published_example() -> None:
    """arXiv 2507.18071: s = exp(0.0005); clipped at 1.0004 for A = 1, with gradient s A / T for A = -1."""
    log_ratio = vector(0.001, -0.0005, 0.002, -0.0005)
    for name in ("gspo", "gspo-token"):
        loss, gradient, _ = loss_and_gradient(name, log_ratio, torch.ones(4, dtype=torch.float64), [0] * 4, Clip(3e-4, 4e-4))
        assert loss == pytest.approx([-1.0004] * 4) and (gradient == 0).all()
        loss, gradient, _ = loss_and_gradient(name, log_ratio, -torch.ones(4, dtype=torch.float64), [0] * 4, Clip(3e-4, 4e-4))
        assert loss == pytest.approx([math.exp(0.0005)] * 4)
        assert torch.allclose(gradient, torch.full((4,), math.exp(0.0005) / 4, dtype=torch.float64))


def test_gspo_of_one_token_is_grpo_and_gspo_token_is_gspo() -> None:
    torch.manual_seed(0)
    log_ratio, a = torch.randn(6, dtype=torch.float64) * 0.3, torch.randn(6, dtype=torch.float64)
    for x, y in zip(
        loss_and_gradient("gspo", log_ratio, a, list(range(6)), DAPO), loss_and_gradient("ppo", log_ratio, a, list(range(6)), DAPO)
    ):
        assert torch.allclose(x, y)
    sample = [0, 0, 0, 1, 1, 2]
    constant = a[torch.tensor(sample)]
    for x, y in zip(
        loss_and_gradient("gspo", log_ratio, constant, sample, DAPO), loss_and_gradient("gspo-token", log_ratio, constant, sample, DAPO)
    ):
        assert torch.allclose(x, y)


def test_cispo_clips_the_weight_but_never_the_gradient() -> None:
    clip = Clip(10.0, 0.2)
    for r, weight in ((1.5, 1.2), (0.5, 0.5), (1.0, 1.0)):
        loss, gradient, clipped = loss_and_gradient("cispo", vector(r).log(), vector(1.0), [0], clip)
        assert gradient.item() == pytest.approx(-weight)  # no derivative of the ratio in it
        assert loss.item() == pytest.approx(-weight * (math.log(r) - 1))
        assert clipped.item() == (r == 1.5)
    _, gradient, _ = loss_and_gradient("ppo", vector(1.5).log(), vector(1.0), [0], Clip(0.2, 0.2))
    assert gradient.item() == 0


def test_cispo_without_the_tokens_that_ppo_clips_has_the_gradient_of_ppo() -> None:
    """arXiv 2506.13585: leaving out A > 0 with r > 1 + high, and A < 0 with r < 1 - low, is what PPO does; the rest must not be clipped."""
    ratio, advantages = (
        torch.linspace(0.4, 1.8, 29, dtype=torch.float64).repeat(2),
        torch.tensor([1.5, -0.5], dtype=torch.float64).repeat_interleave(29),
    )
    kept = ~(((advantages > 0) & (ratio > 1.28)) | ((advantages < 0) & (ratio < 0.8)))
    _, ppo, clipped = loss_and_gradient("ppo", ratio.log(), advantages, list(range(58)), DAPO)
    _, cispo, _ = loss_and_gradient("cispo", ratio.log(), advantages, list(range(58)), Clip(10.0, 10.0))
    assert torch.equal(clipped, ~kept) and torch.allclose(ppo, cispo * kept) and not kept.all()


@pytest.mark.parametrize("name", ["ppo", "gspo"])
@pytest.mark.parametrize("c", [None, 1.4])
def test_gradients_agree_with_finite_differences(name: str, c: float | None) -> None:
    torch.manual_seed(1)
    old, advantages = -torch.rand(12, dtype=torch.float64) * 3, torch.randn(12, dtype=torch.float64)
    logprobs = (old + 0.4 * torch.randn(12, dtype=torch.float64)).requires_grad_()
    sample = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4])
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, old, advantages, sample, 5, Clip(0.2, 0.28, c)).loss_N, (logprobs,))


def test_the_log_ratio_is_clamped_and_nan_stays_nan() -> None:
    ratio = importance_ratio_N(vector(500.0, -500.0, float("nan"), 0.0), vector(0.0, 0.0, 0.0, float("nan")))
    assert ratio[:2].tolist() == pytest.approx([math.exp(20), math.exp(-20)])
    assert ratio[2:].isnan().all()


def test_kl_estimators_on_two_outcomes() -> None:
    """pi = (0.3, 0.7), ref = (0.2, 0.8): exact KL 0.028168; k3 unbiased, k2 0.030901."""
    pi, ref = vector(0.3, 0.7), vector(0.2, 0.8)
    k1, k2, k3 = (kl_estimate_N(kind, pi.log(), ref.log()) for kind in ("k1", "k2", "k3"))
    assert (pi * k1).sum().item() == pytest.approx(0.028168, abs=1e-6)
    assert (pi * k3).sum().item() == pytest.approx(0.028168, abs=1e-6)
    assert (pi * k2).sum().item() == pytest.approx(0.030901, abs=1e-6)
    assert [k1[0].item(), k2[0].item(), k3[0].item()] == pytest.approx([0.40547, 0.08220, 0.07213], abs=1e-5)


def test_k2_gradient_is_that_of_the_reverse_kl() -> None:
    """d/d logits of sum_a pi(a) log pi(a)/ref(a) equals the expectation over pi of the gradient of k2."""
    logits, ref = vector(0.3, -0.2, 0.9).requires_grad_(), torch.log_softmax(vector(0.1, 0.5, -0.3), 0)
    logp = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (estimate,) = torch.autograd.grad((logp.exp().detach() * kl_estimate_N("k2", logp, ref)).sum(), logits)
    assert torch.allclose(exact, estimate)


def test_kl_guards() -> None:
    far = kl_estimate_N("k3", vector(0.0, 0.0), vector(100.0, -100.0))
    assert far.tolist() == [10.0, 10.0]
    assert kl_estimate_N("k1", vector(0.0), vector(-100.0)).item() == 20.0
    assert kl_estimate_N("k3", vector(1e-9), vector(0.0)).item() >= 0
    with pytest.raises(ValueError, match="k4"):
        kl_estimate_N("k4", vector(0.0), vector(0.0))
