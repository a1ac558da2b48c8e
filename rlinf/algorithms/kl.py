"""Estimators of KL(p || q) from tokens sampled from p. Legend: N tokens."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0


def kl_estimate_N(kind: str, logprobs_p_N: Tensor, logprobs_q_N: Tensor) -> Tensor:
    """Per-token estimate of KL(p || q), with d = log q - log p clamped to [-20, 20] (Schulman, "Approximating KL divergence").

    k1 = -d               unbiased, may be negative; as a loss its expected gradient is 0
    k2 = d^2 / 2          biased value; its gradient is that of the reverse KL in expectation
    k3 = exp(d) - d - 1   unbiased, never negative; clamped to [0, 10]
    """
    d_N = (logprobs_q_N - logprobs_p_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return -d_N
    if kind == "k2":
        return d_N.square() / 2
    if kind == "k3":
        return (torch.expm1(d_N) - d_N).clamp(0.0, K3_LIMIT)
    raise ValueError(f"KL estimator must be k1, k2 or k3, got {kind!r}")
