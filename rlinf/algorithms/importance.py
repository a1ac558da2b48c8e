"""Importance weights for the difference between rollout engine and actor: rho = pi_old (actor) / mu (engine) of the same token.

Each weight multiplies the policy loss of a token, without gradient; the denominators of the loss still count all tokens. Source: Yao et al.
2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; verl's rollout correction; decoupled PPO, arXiv 2505.24298.
A token for which the engine reported no log-probability (NaN) makes the weight, and so the loss, NaN; it is never silently taken as 1.
Legend: N tokens that count, S samples of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlinf.algorithms.kl import K3_LIMIT, LOG_RATIO_LIMIT
from rlinf.algorithms.losses import sequence_mean_S

CORRECTIONS = (
    "token-truncate", "token-mask", "sequence-truncate", "sequence-mask", "geometric-truncate", "geometric-mask", "k3-mask",
)  # fmt: skip


@dataclass(frozen=True)
class Correction:
    """`<statistic>-truncate`: the weight is min(statistic, high). `<statistic>-mask`: 0 where the statistic leaves [low, high].

    token       rho of the token
    sequence    product of the response's rho; grows with length: a token ratio of 1.1 is 2.59 over 10 tokens and 13,781 over 100
    geometric   exp of the mean of the response's log rho
    k3          mean of the response's rho - log rho - 1; a mask only, and low does not matter: it is never negative

    What a token or sequence mask keeps has the weight rho (or the product), what a geometric or k3 mask keeps has the weight 1.
    """

    kind: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.kind not in CORRECTIONS:
            raise ValueError(f"importance_sampling_type must be one of {', '.join(CORRECTIONS)}, got {self.kind!r}")
        if self.high <= 0 or self.lower > self.high:
            raise ValueError(f"importance weights cannot be held to [{self.low}, {self.high}]")

    @property
    def lower(self) -> float:
        """The lower bound: `low` for masks of ratios, 0 for all others."""
        return self.low if self.kind in ("token-mask", "sequence-mask", "geometric-mask") else 0.0


class Weights(NamedTuple):
    """weight_N: factors of the token losses. limited_N (bool): tokens whose factor was truncated or set to 0."""

    weight_N: Tensor
    limited_N: Tensor


def importance_weights(correction: Correction, log_rho_N: Tensor, sample_N: Tensor, n_samples: int) -> Weights:
    """Weights from log_rho_N = log pi_old - log mu."""
    name, _, how = correction.kind.partition("-")
    value_N = statistic_N(name, log_rho_N.detach(), sample_N, n_samples)
    if how == "truncate":
        return Weights(value_N.clamp(max=correction.high), value_N > correction.high)
    outside_N = (value_N > correction.high) | (value_N < correction.lower)
    kept_N = value_N if name in ("token", "sequence") else torch.where(value_N.isnan(), value_N, 1.0)
    return Weights(torch.where(outside_N, 0.0, kept_N), outside_N)


def statistic_N(name: str, log_rho_N: Tensor, sample_N: Tensor, n_samples: int) -> Tensor:
    """The statistic called `name` (see Correction), for each token."""
    if name == "token":
        return rho(log_rho_N)
    if name == "sequence":
        return rho(log_rho_N.new_zeros(n_samples).index_add(0, sample_N, log_rho_N))[sample_N]
    if name == "geometric":
        return rho(sequence_mean_S(log_rho_N, sample_N, n_samples))[sample_N]
    clamped_N = log_rho_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return sequence_mean_S((torch.expm1(clamped_N) - clamped_N).clamp(0.0, K3_LIMIT), sample_N, n_samples)[sample_N]


def proximal_logprobs_N(logprobs_N: Tensor, rollout_logprobs_N: Tensor, age_N: Tensor) -> Tensor:
    """log pi_prox of decoupled PPO without an extra forward pass (RLinf), interpolated between the policy that sampled a token and pi:

        log pi_prox = log mu + sg[alpha (log pi - log mu)]        alpha = (age - 1) / age

    age_N: the version that this step produces minus the version that sampled the token, at least 1. With age 1 pi_prox is mu; the older
    the token, the nearer is pi_prox to pi.
    """
    alpha_N = (age_N - 1) / age_N
    return rollout_logprobs_N + alpha_N * (logprobs_N.detach() - rollout_logprobs_N)


def rho(log_rho: Tensor) -> Tensor:
    """exp(log_rho), with log_rho clamped to [-20, 20]."""
    return log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
