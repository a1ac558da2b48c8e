"""Advantages that differ from token to token: KL in the reward, discounting, a critic's values, whitening over tokens. They are computed in
the train workers, which have the tokens.

The driver computes the outcome advantage A of a response (advantages.py). Here it is the reward of the response's last token; the KL to the
reference policy is subtracted at every token; the advantage of a token is the discounted sum of all rewards from it on (REINFORCE++,
arXiv 2501.03262):

    r_t = 1[t = T] A - beta KL_t + d_t        A_t = sum over s >= t of gamma^(s - t) r_s

where d_t is the token's own (dense) reward, if there is one. With a critic's values V, A is the reward itself, and the advantage is the
generalized estimate (GAE, arXiv 1506.02438):

    delta_t = r_t + gamma V_{t+1} - V_t, V after the last token = 0        A_t = sum over s >= t of (gamma lambda)^(s - t) delta_s

Tokens that the policy did not sample (a tool's output) are not time steps: the sampled tokens around them follow each other directly.

Legend: N response tokens of a micro-batch, C those that count (loss mask 1), S samples. A sample's tokens stand together, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf.algorithms.advantages import WHITEN_EPS, mean_of
from rlinf.algorithms.importance import Correction, importance_weights
from rlinf.algorithms.kl import kl_estimate_N

EQUAL = 1e-12  # a standard deviation below this share of the mean is rounding: the advantages are all equal


@dataclass(frozen=True)
class TokenAdvantageSettings:
    """How token advantages are computed.

    kl_beta: 0 = no KL in the reward. normalize_by: the correction whose importance weights are divided by their mean; None = they are not.
    gae_lambda: only used with a critic.
    """

    gamma: float
    kl_beta: float
    kl_penalty_type: str
    whiten: bool
    normalize_by: Correction | None
    gae_lambda: float = 1.0

    @property
    def needs_logprobs(self) -> bool:
        return self.kl_beta > 0 or self.normalize_by is not None


@dataclass(frozen=True)
class SampledTokens:
    """The response tokens of a micro-batch, [N] each.

    outcome_N           outcome advantage of the token's response
    logprobs_N          pi_old; may be None when neither a KL term nor importance weights need it
    rollout_logprobs_N  mu, as the rollout engine reported it
    ref_logprobs_N      the reference policy; may be None without a KL term
    loss_mask_N         1 = the token counts
    sample_N            the sample of each token
    values_N            a critic's value of the state before each token; None = there is no critic
    rewards_N           the token's own (dense) reward; None = there are none
    """

    outcome_N: Tensor
    logprobs_N: Tensor | None
    rollout_logprobs_N: Tensor
    ref_logprobs_N: Tensor | None
    loss_mask_N: Tensor
    sample_N: Tensor
    n_samples: int
    values_N: Tensor | None = None
    rewards_N: Tensor | None = None


def token_advantages(batches: Sequence[SampledTokens], how: TokenAdvantageSettings, all_sum: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Final advantages [N] of every micro-batch of this rank's share of the global batch; 0 where the loss mask is 0.

    all_sum adds a float64 vector over all data-parallel ranks, so every rank must call this function. Raises ValueError when the KL term or
    the importance weights need log-probabilities that are None.
    """
    parts = [estimate_C(b, how) for b in batches]
    if how.whiten:
        parts = whitened(parts, all_sum)
    if how.normalize_by is not None:
        # the policy loss is linear in the advantage: dividing the advantages divides the weights
        scale = 1 / mean_weight(batches, how.normalize_by, all_sum)
        parts = [p * scale for p in parts]
    return [torch.zeros_like(b.outcome_N).masked_scatter(b.loss_mask_N.bool(), p.to(b.outcome_N.dtype)) for b, p in zip(batches, parts)]


def value_targets(batches: Sequence[SampledTokens], how: TokenAdvantageSettings) -> list[Tensor]:
    """The targets of a critic's values, TD(lambda) returns [N]: the advantage before whitening, plus the value."""
    out = []
    for b in batches:
        assert b.values_N is not None
        keep_N = b.loss_mask_N.bool()
        targets_C = estimate_C(b, how) + b.values_N[keep_N].double()
        out.append(torch.zeros_like(b.values_N).masked_scatter(keep_N, targets_C.to(b.values_N.dtype)))
    return out


def estimate_C(batch: SampledTokens, how: TokenAdvantageSettings) -> Tensor:
    """Advantage of each token that counts, before whitening, float64: the discounted sum of rewards, or with a critic GAE."""
    keep_N = batch.loss_mask_N.bool()
    sample_C, outcome_C = batch.sample_N[keep_N], batch.outcome_N[keep_N].double()
    last_C = torch.ones_like(sample_C, dtype=torch.bool)
    last_C[:-1] = sample_C[1:] != sample_C[:-1]
    reward_C = torch.where(last_C, outcome_C, 0.0)
    if how.kl_beta > 0:
        if batch.logprobs_N is None or batch.ref_logprobs_N is None:
            raise ValueError("KL in the reward needs the log-probabilities of the policy and of the reference policy")
        kl_C = kl_estimate_N(how.kl_penalty_type, batch.logprobs_N[keep_N].double(), batch.ref_logprobs_N[keep_N].double())
        reward_C = reward_C - how.kl_beta * kl_C
    if batch.rewards_N is not None:
        reward_C = reward_C + batch.rewards_N[keep_N].double()
    if batch.values_N is None:
        return discounted_sums_N(reward_C, how.gamma, sample_C)
    values_C = batch.values_N[keep_N].double()
    following_C = torch.where(last_C, 0.0, values_C.roll(-1))
    return discounted_sums_N(reward_C + how.gamma * following_C - values_C, how.gamma * how.gae_lambda, sample_C)


def discounted_sums_N(values_N: Tensor, discount: float, sample_N: Tensor) -> Tensor:
    """sum over s >= t of discount^(s - t) values_s within each sample, in log2(longest sample) passes over all tokens at once.

    After the pass with stride k, an element holds the sum of the 2k values that begin at it.
    """
    sums_N, stride = values_N, 1
    longest = int(torch.unique_consecutive(sample_N, return_counts=True)[1].max()) if len(sample_N) else 0
    while stride < longest:
        same_N = sample_N[stride:] == sample_N[:-stride]
        following_N = torch.where(same_N, sums_N[stride:], 0.0) * discount**stride
        sums_N = torch.cat([sums_N[:-stride] + following_N, sums_N[-stride:]])
        stride *= 2
    return sums_N


def whitened(parts: Sequence[Tensor], all_sum: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """(A - mean) / (std + 1e-5) over all tokens of all ranks, population variance; advantages that are all equal give exactly 0."""
    count, total, magnitude = all_sum(sum_of(parts, lambda a: torch.stack([torch.ones_like(a).sum(), a.sum(), a.abs().sum()]))).tolist()
    mean = mean_of(total, magnitude, max(count, 1))
    (squares,) = all_sum(sum_of(parts, lambda a: (a - mean).square().sum()[None])).tolist()
    std = (squares / max(count, 1)) ** 0.5
    if std <= EQUAL * abs(mean):
        return [torch.zeros_like(a) for a in parts]
    return [(a - mean) / (std + WHITEN_EPS) for a in parts]


def mean_weight(batches: Sequence[SampledTokens], correction: Correction, all_sum: Callable[[Tensor], Tensor]) -> float:
    """Token mean of the importance weights of the global batch; 1 when all of them are 0."""
    weights = []
    for b in batches:
        if b.logprobs_N is None:
            raise ValueError("importance weights need the log-probabilities of the policy")
        keep_N = b.loss_mask_N.bool()
        log_rho_C = b.logprobs_N[keep_N].double() - b.rollout_logprobs_N[keep_N].double()
        weights.append(importance_weights(correction, log_rho_C, b.sample_N[keep_N], b.n_samples).weight_N)
    count, total = all_sum(sum_of(weights, lambda w: torch.stack([torch.ones_like(w).sum(), w.sum()]))).tolist()
    return total / count if total != 0 else 1.0


def sum_of(parts: Sequence[Tensor], what: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([what(p) for p in parts]).sum(0)
