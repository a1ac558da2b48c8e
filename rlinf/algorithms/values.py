"""What a critic is for: advantages and value targets for each token (GAE), and the loss that trains the values.

Legend: T tokens of one sample, N response tokens of a micro-batch, flat; S its samples; C the tokens of N that count (loss mask 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from rlinf.algorithms.advantages import WHITEN_EPS
from rlinf.algorithms.aggregation import Denominators, token_weights_N
from rlinf.algorithms.objective import MetricSums, largest, total

AllSum = Callable[[np.ndarray], np.ndarray]  # over the ranks that hold the rest of the batch


def gae(rewards_T: np.ndarray, values_T: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Generalized advantage estimation (arXiv 1506.02438) of one finished response, float64 [T].

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = sum over k >= t of (gamma lambda)^(k-t) delta_k; V after the last token is 0. values_T[t] is
    the value of the state before token t. A + V are the value targets: TD(lambda) returns.
    """
    values = values_T.astype(np.float64)
    deltas = rewards_T + gamma * np.append(values[1:], 0.0) - values
    backwards = accumulate(deltas[::-1].tolist(), lambda advantage, delta: delta + gamma * lam * advantage)
    return np.fromiter(backwards, np.float64, len(deltas))[::-1]


def token_advantages(reward: float, values_T: np.ndarray, loss_mask_T: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """GAE of one sample [T] that earned `reward` with its last token; 0 where the mask is 0.

    Tokens that the policy did not sample are no steps of its own: what they lead to belongs to the sampled token before them.
    """
    counts_T = loss_mask_T.astype(bool)
    advantages_T = np.zeros(len(values_T))
    if counts_T.any():
        rewards_C = np.zeros(counts_T.sum())
        rewards_C[-1] = reward
        advantages_T[counts_T] = gae(rewards_C, values_T[counts_T], gamma, lam)
    return advantages_T


def batch_advantages(
    rewards_N: np.ndarray, values_N: np.ndarray, loss_mask_N: np.ndarray, lengths: Sequence[int], gamma: float, lam: float
) -> np.ndarray:
    """token_advantages of samples that lie one behind the other; rewards_N holds a sample's reward at each of its tokens."""
    borders = np.cumsum(lengths)[:-1]
    samples = zip(*(np.split(t, borders) for t in (rewards_N, values_N, loss_mask_N)))
    found = [token_advantages(float(r[0]), v, m, gamma, lam) if len(r) else np.zeros(0) for r, v, m in samples]
    return np.concatenate([*found, np.zeros(0)])


def moments(parts_C: Sequence[np.ndarray], all_sum: AllSum) -> tuple[float, float, float]:
    """(how many, mean, population variance) of all tokens that count, over all ranks; in two passes."""
    mine_C = np.concatenate([*parts_C, np.zeros(0)]).astype(np.float64)
    count, summed = all_sum(np.array([len(mine_C), mine_C.sum()]))
    mean = summed / max(count, 1.0)
    (squares,) = all_sum(np.array([np.square(mine_C - mean).sum()]))
    return float(count), float(mean), float(squares / max(count, 1.0))


def whiten_tokens(advantages: Sequence[np.ndarray], masks: Sequence[np.ndarray], all_sum: AllSum) -> list[np.ndarray]:
    """(A - mean) / (std + 1e-5) over the tokens that count of the whole global batch, population variance; 0 where the mask is 0.

    Collective: every rank that holds a part of the batch, each sample on one of them.
    """
    counts = [m.astype(bool) for m in masks]
    _, mean, variance = moments([a[c] for a, c in zip(advantages, counts)], all_sum)
    return [np.where(c, (a - mean) / (np.sqrt(variance) + WHITEN_EPS), 0.0) for a, c in zip(advantages, counts)]


@dataclass(frozen=True)
class ValueSettings:
    """clip: how far a value may move from the old one before its loss stops falling; None = as far as it likes."""

    loss_agg_func: str
    clip: float | None
    max_new_tokens: int


@dataclass(frozen=True)
class ValueTokens:
    """The response tokens of one micro-batch, [N] each. values_N with gradient, old_values_N as they were when the returns were made;
    where loss_mask_N is 0 the other arrays may hold anything.
    """

    values_N: Tensor
    old_values_N: Tensor
    returns_N: Tensor
    loss_mask_N: Tensor
    sample_N: Tensor
    n_samples: int


def value_objective(batch: ValueTokens, denominators: Denominators, settings: ValueSettings) -> tuple[Tensor, MetricSums]:
    """The micro-batch's share of the mini-batch's value loss (scalar, with gradient), and its share of the metrics.

    Token loss: max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2, as in PPO's reference implementation; without clip
    (V - R)^2 / 2. Aggregated as the policy's loss is.
    """
    keep_N = batch.loss_mask_N.bool()
    values_C, old_C, returns_C = (t[keep_N].to(torch.float64) for t in (batch.values_N, batch.old_values_N, batch.returns_N))
    weights_C = token_weights_N(settings.loss_agg_func, batch.sample_N[keep_N], batch.n_samples, denominators, settings.max_new_tokens)
    loss_C = (values_C - returns_C).square() / 2
    clipped_C = torch.zeros_like(keep_N[keep_N])
    if settings.clip is not None:
        bounded_C = (old_C + (values_C - old_C).clamp(-settings.clip, settings.clip) - returns_C).square() / 2
        clipped_C = bounded_C > loss_C
        loss_C = torch.maximum(loss_C, bounded_C)
    loss = (weights_C * loss_C).sum()
    with torch.no_grad():
        error_C = returns_C - old_C
        sums = {
            "loss": loss,
            "tokens": torch.ones_like(weights_C).sum(),
            "clipped": total(clipped_C),
            "value": total(old_C),
            "return": total(returns_C),
            "return_squared": total(returns_C.square()),
            "error": total(error_C),
            "error_squared": total(error_C.square()),
        }
    return loss.to(batch.values_N.dtype), MetricSums({k: v.detach() for k, v in sums.items()}, {"error": largest(error_C.abs())})


def finalize_value_metrics(metrics: MetricSums, n_minibatches: int = 1) -> dict[str, float]:
    """Named scalars from the sums of all micro-batches and ranks of n_minibatches mini-batches; means are over tokens that count."""
    s = {k: v.item() for k, v in metrics.sums.items()}
    n = max(s["tokens"], 1.0)
    spread = s["return_squared"] / n - (s["return"] / n) ** 2
    unexplained = s["error_squared"] / n - (s["error"] / n) ** 2
    return {
        "critic/loss": s["loss"] / n_minibatches,
        "critic/value_mean": s["value"] / n,
        "critic/return_mean": s["return"] / n,
        "critic/value_error": (s["error_squared"] / n) ** 0.5,
        "critic/value_error_max": metrics.maxima["error"].item(),
        "critic/explained_variance": 1.0 - unexplained / spread if spread > 1e-9 * s["return_squared"] / n else float("nan"),
        "critic/clip_fraction": s["clipped"] / n,
    }
