"""How token losses are aggregated to the loss: a weight for each token, with global denominators, so that no split changes the result.

Legend: N tokens that count (loss mask 1), S samples of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Denominators:
    """Counts over all data-parallel ranks and micro-batches of one mini-batch: tokens that count, and samples with at least one of them."""

    tokens: int
    samples: int


def token_weights_N(mode: str, sample_N: Tensor, n_samples: int, denominators: Denominators, max_new_tokens: int) -> Tensor:
    """Weights w with loss = sum over all micro-batches and ranks of sum_N(w_N * loss_N). float64.

    token-mean                1 / tokens                 (DAPO, arXiv 2503.14476; RLinf; AReaL)
    seq-mean-token-mean       1 / (samples * T_i)        (GRPO, arXiv 2402.03300; GSPO)
    seq-mean-token-sum        1 / samples                (REINFORCE)
    seq-mean-token-sum-norm   1 / (samples * L_max)      (Dr.GRPO, arXiv 2503.20783; L_max = max_new_tokens)

    T_i counts the tokens of sample i that count; a sample is never cut over micro-batches. A fully masked sample adds neither to a
    numerator nor to a denominator. A mini-batch in which nothing counts has loss 0.
    """
    tokens, samples = max(denominators.tokens, 1), max(denominators.samples, 1)
    ones_N = torch.ones(sample_N.shape, dtype=torch.float64, device=sample_N.device)
    if mode == "token-mean":
        return ones_N / tokens
    if mode == "seq-mean-token-mean":
        lengths_S = ones_N.new_zeros(n_samples).index_add(0, sample_N, ones_N)
        return 1.0 / (lengths_S[sample_N] * samples)
    if mode == "seq-mean-token-sum":
        return ones_N / samples
    if mode == "seq-mean-token-sum-norm":
        return ones_N / (samples * max_new_tokens)
    raise ValueError(f"unknown loss_agg_func {mode!r}")
