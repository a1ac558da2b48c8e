"""The value loss of a critic: trains its values towards their targets (token_advantages.value_targets).

Legend: N response tokens of a micro-batch, flat; S its samples; C the tokens of N that count (loss mask 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf.algorithms.aggregation import Denominators, token_weights_N
from rlinf.algorithms.objective import MetricSums, largest, total


@dataclass(frozen=True)
class ValueSettings:
    """clip: beyond this distance from the old value, a new value no longer lowers the loss; None = no clipping."""

    loss_agg_func: str
    clip: float | None
    max_new_tokens: int


@dataclass(frozen=True)
class ValueTokens:
    """The response tokens of one micro-batch, [N] each. values_N: with gradient. old_values_N: those from which the returns were computed.
    Where loss_mask_N is 0 the other arrays may hold anything.
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
    (V - R)^2 / 2. It is aggregated like the policy loss.
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
    """Named scalars from the sums of all micro-batches and ranks of n_minibatches mini-batches; means are over tokens that count,
    of none they are NaN."""
    s = {k: v.item() for k, v in metrics.sums.items()}
    n = s["tokens"] or math.nan
    spread = s["return_squared"] / n - (s["return"] / n) ** 2
    unexplained = s["error_squared"] / n - (s["error"] / n) ** 2
    return {
        "critic/loss": s["loss"] / n_minibatches,
        "critic/value_mean": s["value"] / n,
        "critic/return_mean": s["return"] / n,
        "critic/value_error": (s["error_squared"] / n) ** 0.5,
        "critic/value_error_max": metrics.maxima["error"].item() if s["tokens"] else math.nan,
        "critic/explained_variance": 1.0 - unexplained / spread if spread > 1e-9 * s["return_squared"] / n else math.nan,
        "critic/clip_fraction": s["clipped"] / n,
    }
