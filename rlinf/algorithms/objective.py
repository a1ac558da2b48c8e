"""The GRPO/PPO objective of one micro-batch: start here to see what the policy is trained on.

    loss = policy loss + kl_beta * KL(pi || pi_ref) - entropy_bonus * entropy

The advantages given are final (see advantages.py). The losses of all micro-batches on all data-parallel ranks add up to the loss of the
mini-batch, and so do the gradients; metrics are kept as sums and maxima, which are merged in the same way. No result depends on the split.
Legend: N response tokens of the micro-batch, flat; S its samples; C the tokens of N that count (loss mask 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlinf.algorithms.aggregation import Denominators, token_weights_N
from rlinf.algorithms.importance import Correction, importance_weights, proximal_logprobs_N
from rlinf.algorithms.kl import kl_estimate_N
from rlinf.algorithms.losses import LOSSES, Clip, PolicyLoss, check_token_losses, cispo, gspo, gspo_token, importance_ratio_N


@dataclass(frozen=True)
class ObjectiveSettings:
    """The part of the `algorithm` section that the loss needs.

    correction: None = no importance weights: the engine's probabilities are assumed to be the actor's.
    decoupled-ppo is ppo with the correction `token-mask`: pi_old is pi_prox, and the engine's policy is pi_behaviour. When the tokens have
    ages, pi_prox is interpolated (importance.proximal_logprobs_N). own_loss: the user's own function, where loss_type names one.
    """

    loss_type: str
    loss_agg_func: str
    clip_low: float
    clip_high: float
    clip_c: float | None
    kl_beta: float
    kl_penalty_type: str
    entropy_bonus: float
    correction: Correction | None
    max_new_tokens: int
    own_loss: PolicyLoss | None = None

    def __post_init__(self) -> None:
        if self.own_loss is None and self.loss_type not in LOSSES:
            raise ValueError(f"loss_type must be one of {sorted(LOSSES)}, got {self.loss_type!r}")
        if self.clip_c is not None and (self.clip_c <= 1 or self.loss in (gspo, gspo_token, cispo)):
            raise ValueError(f"the dual-clip constant must be > 1 and is for ppo, got {self.clip_c} with {self.loss_type}")
        if self.loss_type == "decoupled-ppo" and self.correction is None:
            raise ValueError("decoupled-ppo needs a correction: it is what weighs pi_prox against pi_behaviour")

    @property
    def loss(self) -> PolicyLoss:
        """The function of the policy loss."""
        return self.own_loss or LOSSES[self.loss_type]


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of one micro-batch, [N] each, log-probabilities in fp32 (of softmax(logits / temperature)).

    logprobs_N           pi, with gradient
    entropy_N            with gradient when there is an entropy bonus
    old_logprobs_N       pi_old; None = pi itself (first mini-batch after the rollout: the ratio is exactly 1)
    rollout_logprobs_N   mu, as the rollout engine reported it; NaN where it reported nothing
    ref_logprobs_N       the reference policy; None = there is none
    loss_mask_N          1 = the token counts; where it is 0 the other arrays may hold anything
    sample_N             int64, the sample 0..n_samples-1 of each token; a sample is never divided over micro-batches
    age_N                by how many versions the policy that sampled the token is older, at least 1; None = old_logprobs_N is used as it is
    """

    logprobs_N: Tensor
    entropy_N: Tensor
    old_logprobs_N: Tensor | None
    rollout_logprobs_N: Tensor
    ref_logprobs_N: Tensor | None
    advantages_N: Tensor
    loss_mask_N: Tensor
    sample_N: Tensor
    n_samples: int
    age_N: Tensor | None = None

    def counted(self) -> ResponseTokens:
        """Only the tokens that count: [C] instead of [N]."""
        rows_C = self.loss_mask_N.nonzero()[:, 0]  # computed once, because the host has to wait for the GPU to find them
        names = (
            "logprobs_N",
            "entropy_N",
            "old_logprobs_N",
            "rollout_logprobs_N",
            "ref_logprobs_N",
            "advantages_N",
            "loss_mask_N",
            "sample_N",
            "age_N",
        )
        return replace(self, **{n: value.index_select(0, rows_C) for n in names if (value := getattr(self, n)) is not None})


@dataclass(frozen=True)
class MetricSums:
    """Metrics of one or more micro-batches as float64 scalars, to be merged by addition and maximum. Which keys there are depends on the
    settings only, never on the data, so that all ranks have the same."""

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]

    def __add__(self, other: MetricSums) -> MetricSums:
        return MetricSums(
            {k: v + other.sums[k] for k, v in self.sums.items()}, {k: torch.maximum(v, other.maxima[k]) for k, v in self.maxima.items()}
        )

    def reduced(self, all_sum: Callable[[Tensor], Tensor], all_max: Callable[[Tensor], Tensor]) -> MetricSums:
        """Merged over ranks: one collective for all sums, and one for all maxima if there are any."""
        sums = all_sum(torch.stack(list(self.sums.values())))
        maxima = all_max(torch.stack(list(self.maxima.values()))) if self.maxima else ()
        return MetricSums(dict(zip(self.sums, sums)), dict(zip(self.maxima, maxima)))


def policy_objective(batch: ResponseTokens, denominators: Denominators, settings: ObjectiveSettings) -> tuple[Tensor, MetricSums]:
    """The micro-batch's share of the mini-batch's loss (scalar, with gradient), and its share of the metrics.

    A micro-batch without tokens that count has loss 0, which is still connected to logprobs_N. Raises ValueError when kl_beta > 0 and there
    are no reference log-probabilities, UserError when a user's loss does not return valid TokenLosses.
    """
    tokens = batch.counted()
    logprobs_C, sample_C = tokens.logprobs_N, tokens.sample_N
    old_logprobs_C = logprobs_C.detach() if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    if tokens.age_N is not None:
        old_logprobs_C = proximal_logprobs_N(logprobs_C, tokens.rollout_logprobs_N, tokens.age_N)
    advantages_C = tokens.advantages_N.to(logprobs_C.dtype)
    weights_C = token_weights_N(settings.loss_agg_func, sample_C, tokens.n_samples, denominators, settings.max_new_tokens)

    clip = Clip(settings.clip_low, settings.clip_high, settings.clip_c)
    policy = settings.loss(logprobs_C, old_logprobs_C, advantages_C, sample_C, tokens.n_samples, clip)
    check_token_losses(policy, logprobs_C, settings.loss_type)
    policy_C, limited_C = policy.loss_N, None
    if settings.correction is not None:
        log_rho_C = old_logprobs_C - tokens.rollout_logprobs_N
        weight_C, limited_C = importance_weights(settings.correction, log_rho_C, sample_C, tokens.n_samples)
        policy_C = policy_C * weight_C
    policy_loss = (weights_C * policy_C).sum()

    loss, kl_C = policy_loss, None
    if tokens.ref_logprobs_N is not None:
        kl_C = kl_estimate_N(settings.kl_penalty_type, logprobs_C, tokens.ref_logprobs_N)
    if settings.kl_beta > 0:
        if kl_C is None:
            raise ValueError("kl_beta > 0 needs the log-probabilities of the reference policy")
        loss = loss + settings.kl_beta * (weights_C * kl_C).sum()
    if settings.entropy_bonus != 0:
        loss = loss - settings.entropy_bonus * (weights_C * tokens.entropy_N).sum()

    with torch.no_grad():
        sums = {
            "loss": policy_loss,
            "tokens": torch.ones_like(weights_C).sum(),
            "entropy": total(tokens.entropy_N),
            "ratio": total(importance_ratio_N(logprobs_C, old_logprobs_C)),
            "clipped": total(policy.clipped_N),
            "dual_clipped": total(policy.dual_clipped_N),
            "approx_kl": total(kl_estimate_N("k3", old_logprobs_C, logprobs_C)),
        } | ({} if kl_C is None else {"kl": total(kl_C)})
        rollout = rollout_agreement(old_logprobs_C, tokens.rollout_logprobs_N, limited_C)
    metrics = MetricSums({k: v.detach() for k, v in (sums | rollout.sums).items()}, rollout.maxima)
    return loss.to(logprobs_C.dtype), metrics


def rollout_agreement(old_logprobs_C: Tensor, rollout_logprobs_C: Tensor, limited_C: Tensor | None) -> MetricSums:
    """Metrics of how far actor and rollout engine differ on the same tokens, without tokens for which the engine reported nothing.

    limited_C: with a correction, the tokens whose weight was truncated or set to 0.
    """
    known_C = ~rollout_logprobs_C.isnan()
    gap_C = torch.where(known_C, (old_logprobs_C - rollout_logprobs_C).abs(), 0.0)
    sums = {"gap": total(gap_C), "gap_tokens": total(known_C)}
    maxima = {"gap": largest(gap_C)}
    if limited_C is not None:
        ratio_C = importance_ratio_N(old_logprobs_C, rollout_logprobs_C)
        sums |= {
            "importance": total(ratio_C),
            "importance_clipped": total(limited_C),
            "importance_kl": total(kl_estimate_N("k3", rollout_logprobs_C, old_logprobs_C)),
        }
        maxima |= {"importance": largest(ratio_C), "importance_inverse": largest(1 / ratio_C)}
    return MetricSums(sums, maxima)


def finalize_metrics(sums: dict[str, Tensor], maxima: dict[str, Tensor], n_minibatches: int = 1) -> dict[str, float]:
    """The metrics train/* from sums and maxima over all micro-batches and ranks of n_minibatches mini-batches.

    Means and extremes are over the tokens that count; of none they are NaN. train/loss is the mean of the mini-batches' policy losses.
    """
    s = dict(zip(sums, torch.stack([*sums.values()]).tolist()))
    tokens, gap_tokens = s["tokens"] or math.nan, s["gap_tokens"] or math.nan
    metrics = {
        "train/loss": s["loss"] / n_minibatches,
        "train/entropy_loss": s["entropy"] / tokens,
        "train/ratio": s["ratio"] / tokens,
        "train/clip_fraction": s["clipped"] / tokens,
        "train/dual_clip_fraction": s["dual_clipped"] / tokens,
        "train/approx_kl": s["approx_kl"] / tokens,
        "train/rollout_logprob_gap_mean": s["gap"] / gap_tokens,
        "train/rollout_logprob_gap_max": maxima["gap"].item() if s["gap_tokens"] else math.nan,
        "train/tokens": s["tokens"],
    }
    if "kl" in s:
        metrics["train/kl_loss"] = s["kl"] / tokens
    if "importance" in s:
        metrics["train/importance_weight_mean"] = s["importance"] / tokens
        metrics["train/importance_weight_max"] = maxima["importance"].item() if s["tokens"] else math.nan
        metrics["train/importance_weight_min"] = 1 / maxima["importance_inverse"].item() if s["tokens"] else math.nan
        metrics["train/importance_weight_clipped"] = s["importance_clipped"] / tokens
        metrics["train/rollout_kl"] = s["importance_kl"] / tokens
    return metrics


def early_stop(ratio_sum: float, token_count: float, limit: float | None) -> bool:
    """Whether to skip the optimizer step: the token-mean importance ratio of the whole mini-batch exceeds `limit`, or is not a number.

    ratio_sum and token_count are sums over all micro-batches and data-parallel ranks, so that every rank decides the same. limit: None = no
    limit. A mini-batch in which no token counts is always skipped: weight decay and momentum would move the weights even without gradients.
    """
    if token_count == 0:
        return True
    return limit is not None and not ratio_sum / token_count <= limit


def total(values: Tensor) -> Tensor:
    return values.to(torch.float64).sum()


def largest(values: Tensor) -> Tensor:
    """The maximum of non-negative numbers; 0 of none."""
    return torch.cat([values.to(torch.float64), values.new_zeros(1, dtype=torch.float64)]).max()
