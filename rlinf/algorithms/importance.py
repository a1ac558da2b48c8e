"""Weights that correct for a rollout engine that is not quite the actor: rho = pi_old (actor) / mu (engine), same weights, same token.

Each function takes log_rho_N = log pi_old - log mu and gives a weight for each token's policy loss, without gradient. The denominators
of the loss stay those of all tokens. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training";
verl's rollout correction. A token that the engine did not report (NaN) makes the weight, and so the loss, NaN: never silently 1.
Legend: N tokens that count, S samples of the micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlinf.algorithms.kl import K3_LIMIT, LOG_RATIO_LIMIT
from rlinf.algorithms.losses import sequence_mean_S


def token_truncated(log_rho_N: Tensor, limit: float) -> Tensor:
    """min(rho, limit)."""
    return rho(log_rho_N).clamp(max=limit)


def sequence_truncated(log_rho_N: Tensor, sample_N: Tensor, n_samples: int, limit: float) -> Tensor:
    """min(product of the response's rho, limit). Grows with length: a token ratio of 1.1 is 2.59 over 10 tokens and 13,781 over 100."""
    log_product_S = torch.zeros(n_samples, dtype=log_rho_N.dtype, device=log_rho_N.device).index_add(0, sample_N, log_rho_N.detach())
    return rho(log_product_S).clamp(max=limit)[sample_N]


def token_mask(log_rho_N: Tensor, low: float, high: float) -> Tensor:
    """rho where it lies in [low, high], else 0."""
    return within(rho(log_rho_N), low, high) * rho(log_rho_N)


def geometric_mask(log_rho_N: Tensor, sample_N: Tensor, n_samples: int, low: float, high: float) -> Tensor:
    """1 for the tokens of a response whose exp(mean log rho) lies in [low, high], else 0."""
    return within(rho(sequence_mean_S(log_rho_N, sample_N, n_samples)), low, high)[sample_N]


def k3_mask(log_rho_N: Tensor, sample_N: Tensor, n_samples: int, limit: float) -> Tensor:
    """1 for the tokens of a response whose mean of rho - log rho - 1 is at most limit, else 0."""
    clamped_N = log_rho_N.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k3_N = (torch.expm1(clamped_N) - clamped_N).clamp(0.0, K3_LIMIT)
    return within(sequence_mean_S(k3_N, sample_N, n_samples), 0.0, limit)[sample_N]


def rho(log_rho: Tensor) -> Tensor:
    return log_rho.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def within(values: Tensor, low: float, high: float) -> Tensor:
    """1 inside the bounds, 0 outside, NaN for NaN."""
    return torch.where(values.isnan(), values, ((values >= low) & (values <= high)).to(values.dtype))
