"""The loss of supervised fine-tuning: the negative log-likelihood of response tokens, optionally with samples weighted by their own loss.

Without weights the loss is the mean over all response tokens of the global batch. With weights (arXiv 2502.06733) it is
sum_i w_i l_i, where l_i is the token mean of sample i and the weights of the global batch sum to 1.

Legend: N response tokens of the micro-batch, flat; S samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlinf.algorithms.objective import MetricSums, total

# f(h), for h in [-1, 1]: where a loss lies between the smallest (-1) and the largest (1) of the batch
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "lin_upper": lambda h: (h + 1).clamp(max=1.0),
    "quadratic": lambda h: 1 - h.square(),
    "extremes": lambda h: h.abs(),
    "upper": lambda h: 0.5 * h + 0.5,
    "uniform": torch.zeros_like,
}


def loss_weights_S(losses_S: Tensor, shape: str, temperature: float) -> Tensor:
    """Weights that sum to 1: softmax(f(h) / temperature), float64, without gradient (arXiv 2502.06733 §3 with delta = 1).

    Adding a constant to all losses, or scaling them, changes nothing; equal losses give equal weights. lin_upper gives samples with a low
    loss a smaller weight, and bounds the weight of outliers: the largest is at most exp(1 / temperature) times the smallest.
    """
    losses_S = losses_S.detach().to(torch.float64)
    if not len(losses_S):
        return losses_S
    low, high = losses_S.min(), losses_S.max()
    h_S = (2 * losses_S - low - high) / (high - low) if high > low else torch.zeros_like(losses_S)
    return (SHAPES[shape](h_S) / temperature).softmax(0)


def sample_losses_S(logprobs_N: Tensor, sample_N: Tensor, n_samples: int) -> Tensor:
    """Token-mean negative log-likelihood of each sample of a micro-batch, float64."""
    zeros_S = torch.zeros(n_samples, dtype=torch.float64, device=logprobs_N.device)
    sums_S = zeros_S.index_add(0, sample_N, -logprobs_N.detach().to(torch.float64))
    return sums_S / lengths_S(sample_N, n_samples)


def lengths_S(sample_N: Tensor, n_samples: int) -> Tensor:
    """Response tokens of each sample, float64."""
    return torch.bincount(sample_N, minlength=n_samples).to(torch.float64)


def supervised_objective(logprobs_N: Tensor, entropy_N: Tensor, weights_N: Tensor) -> tuple[Tensor, MetricSums]:
    """The micro-batch's share of the loss, -sum_N(weights_N * logprobs_N), and of the metrics. The weights carry the denominators."""
    loss = -(weights_N * logprobs_N).sum()
    with torch.no_grad():
        sums = {
            "nll": total(-logprobs_N),
            "objective": total(loss),
            "tokens": total(torch.ones_like(logprobs_N)),
            "entropy": total(entropy_N),
        }
    return loss.to(logprobs_N.dtype), MetricSums(sums, {})


def finalize_supervised(metrics: MetricSums) -> dict[str, float]:
    """Means over response tokens, the loss that was minimised, and how many tokens there were."""
    s = {name: value.item() for name, value in metrics.sums.items()}
    tokens = max(s["tokens"], 1.0)
    return {"loss": s["nll"] / tokens, "objective": s["objective"], "entropy": s["entropy"] / tokens, "tokens": s["tokens"]}
