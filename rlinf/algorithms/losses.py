"""Policy losses, token by token: ratio x advantage, with the trust region of each method.

Legend: N tokens that count, S samples of the micro-batch; sample_N is the sample (0..S-1) of each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlinf.algorithms.kl import LOG_RATIO_LIMIT
from rlinf.errors import UserError

GSPO_TOKEN_LOG_LIMIT = 10.0


class Clip(NamedTuple):
    """The trust region [1 - low, 1 + high] of the ratio; c > 1 bounds the loss of a negative advantage (dual clip), None = off."""

    low: float
    high: float
    c: float | None = None


class TokenLosses(NamedTuple):
    """loss_N: with gradient. clipped_N, dual_clipped_N (bool): the tokens whose loss was set by the clip range, or by the dual clip."""

    loss_N: Tensor
    clipped_N: Tensor
    dual_clipped_N: Tensor


def importance_ratio_N(logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """pi / pi_old with the log-ratio clamped to [-20, 20]; NaN stays NaN."""
    return (logprobs_N - old_logprobs_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(ratio_N: Tensor, advantages_N: Tensor, clip: Clip) -> TokenLosses:
    """max(-r A, -clip(r, 1 - low, 1 + high) A); with dual clip at most -c A where A < 0.

    PPO, arXiv 1707.06347; low != high is DAPO's clip-higher, arXiv 2503.14476; dual clip, arXiv 1912.09729.
    """
    plain_N = -ratio_N * advantages_N
    bounded_N = -ratio_N.clamp(1 - clip.low, 1 + clip.high) * advantages_N
    loss_N = torch.maximum(plain_N, bounded_N)
    clipped_N = bounded_N > plain_N
    dual_clipped_N = torch.zeros_like(clipped_N)
    if clip.c is not None:
        ceiling_N = -clip.c * advantages_N
        dual_clipped_N = (advantages_N < 0) & (loss_N > ceiling_N)
        loss_N = torch.where(dual_clipped_N, ceiling_N, loss_N)
    return TokenLosses(loss_N, clipped_N, dual_clipped_N)


def ppo(logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, sample_N: Tensor, n_samples: int, clip: Clip) -> TokenLosses:
    """The loss of PPO and GRPO (arXiv 1707.06347, 2402.03300): a trust region for each token."""
    return clipped_surrogate(importance_ratio_N(logprobs_N, old_logprobs_N), advantages_N, clip)


def gspo(logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, sample_N: Tensor, n_samples: int, clip: Clip) -> TokenLosses:
    """GSPO (arXiv 2507.18071): the ratio of a response is s = exp(mean_t log r_t), with one trust region for the whole response.

    Every token has the loss of its response, so that the aggregation seq-mean-token-mean is exactly the paper's mean over responses.
    """
    log_s_S = sequence_mean_S(logprobs_N - old_logprobs_N, sample_N, n_samples)
    s_S = log_s_S.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return clipped_surrogate(s_S[sample_N], advantages_N, clip)


def gspo_token(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, sample_N: Tensor, n_samples: int, clip: Clip
) -> TokenLosses:
    """GSPO-token (arXiv 2507.18071): s_t = sg[s] * pi / sg[pi]: GSPO's values, gradients token by token. log s_t is at most 10."""
    log_s_S = sequence_mean_S((logprobs_N - old_logprobs_N).detach(), sample_N, n_samples)
    log_s_N = logprobs_N - logprobs_N.detach() + log_s_S[sample_N]
    return clipped_surrogate(log_s_N.clamp(-LOG_RATIO_LIMIT, GSPO_TOKEN_LOG_LIMIT).exp(), advantages_N, clip)


def cispo(logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, sample_N: Tensor, n_samples: int, clip: Clip) -> TokenLosses:
    """CISPO (MiniMax-M1, arXiv 2506.13585): -sg[clip(r, 1 - low, 1 + high)] A log pi: the weight is clipped, the gradient never vanishes.

    The paper has no lower bound: clip_ratio_low >= 1 removes it.
    """
    ratio_N = importance_ratio_N(logprobs_N, old_logprobs_N).detach()
    weight_N = ratio_N.clamp(1 - clip.low, 1 + clip.high)
    return TokenLosses(-weight_N * advantages_N * logprobs_N, weight_N != ratio_N, torch.zeros_like(ratio_N, dtype=torch.bool))


def check_token_losses(policy: object, logprobs_N: Tensor, name: str) -> None:
    """Raise UserError unless `policy`, which the loss `name` returned, has one number for each token, with gradient. A mean would broadcast
    silently, and the result would depend on the split; without a gradient only the KL term would be trained."""
    wanted = f"a loss returns TokenLosses(loss_N, clipped_N, dual_clipped_N), each of the {logprobs_N.numel()} tokens given"
    if not isinstance(policy, TokenLosses):
        raise UserError(f"algorithm.loss_type: {name} returned a {type(policy).__name__}; {wanted}")
    for part, values in policy._asdict().items():
        if not isinstance(values, Tensor) or values.shape != logprobs_N.shape:
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"algorithm.loss_type: {name} returned {part} {found}; {wanted}")
    if logprobs_N.requires_grad and not policy.loss_N.requires_grad:
        raise UserError(f"algorithm.loss_type: {name} returned a loss_N without gradient; compute it from the log-probabilities given")


def sequence_mean_S(values_N: Tensor, sample_N: Tensor, n_samples: int) -> Tensor:
    """Mean of each sample's tokens; 0 for a sample without tokens."""
    sums_S = values_N.new_zeros(n_samples).index_add(0, sample_N, values_N)
    counts_S = values_N.new_zeros(n_samples).index_add(0, sample_N, torch.ones_like(values_N))
    return sums_S / counts_S.clamp(min=1)


PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor, int, Clip], TokenLosses]
LOSSES: dict[str, PolicyLoss] = {
    "ppo": ppo,
    # AReaL, arXiv 2505.24298: around pi_prox = pi_old; its weight pi_prox / pi_behaviour is a Correction (importance.py)
    "decoupled-ppo": ppo,
    "gspo": gspo,
    "gspo-token": gspo_token,
    "cispo": cispo,
}
