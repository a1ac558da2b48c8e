"""Choosing tokens: one uniform number per token, keyed by (seed, sample, position), through the inverse distribution function.

The choice is a function of the token's own logits and key, so it does not depend on batching, order or other requests.
Legend: B rows, V vocabulary, K blocks, S candidates kept by top-k/top-p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.rollout.contract import SamplingParams

BLOCK = 128  # tokens: the inverse distribution function is looked up over block sums first, then inside one block


@dataclass(frozen=True)
class Draw:
    """tokens [B] int64; logprobs [B] float32 of softmax(logits / temperature) before truncation; truncated_mass [B] float32."""

    tokens: Tensor
    logprobs: Tensor
    truncated_mass: Tensor


def uniform(seed: int, sample_id: str, position: int) -> float:
    """The noise of one token, in [0, 1): 53 bits of a blake2b hash of its key."""
    digest = hashlib.blake2b(f"{seed}\0{sample_id}\0{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@torch.inference_mode()
def draw(logits_BV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Draw:
    """Sample one token a row; the logits are overwritten. Temperature 0 is greedy, with log-probabilities of temperature 1.

    Raises ValueError for logits that are not finite.
    """
    device = logits_BV.device
    temperatures = [p.temperature or 1.0 for p in params]
    if any(t != 1.0 for t in temperatures):
        logits_BV.div_(torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None])
    weights_BV = logits_BV.sub_(logits_BV.amax(-1, keepdim=True)).exp_()  # in place: fresh pages for 50 MB cost more than the arithmetic
    blocks_BKb = _blocks(weights_BV)
    sums_BK = blocks_BKb.sum(-1).double()
    total_B = sums_BK.sum(-1)
    if not bool(torch.isfinite(total_B).all()):
        raise ValueError("the model's logits are not finite")
    u_B = torch.tensor(uniforms, dtype=torch.float64, device=device)

    block_B, rest_B = inverse_cdf(sums_BK, u_B * total_B)
    within_B, _ = inverse_cdf(blocks_BKb[torch.arange(len(params), device=device), block_B].double(), rest_B)
    tokens_B = block_B * BLOCK + within_B
    truncated_B = torch.zeros(len(params), device=device)

    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    if greedy:
        tokens_B[greedy] = weights_BV[greedy].argmax(-1)
    cut = [i for i, p in enumerate(params) if p.temperature and (p.top_p < 1 or 0 < p.top_k < weights_BV.shape[1])]
    if cut:
        tokens_B[cut], truncated_B[cut] = _draw_truncated(weights_BV[cut], total_B[cut], [params[i] for i in cut], u_B[cut])

    chosen_B = weights_BV.gather(1, tokens_B[:, None])[:, 0].double()
    return Draw(tokens_B, (chosen_B / total_B).log().float(), truncated_B)


def inverse_cdf(weights_BN: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative weight exceeds the target, never one of weight 0; and the target less what lies before it."""
    cumulative_BN = weights_BN.cumsum(-1)
    index_B = torch.searchsorted(cumulative_BN, targets_B[:, None], right=True)[:, 0]
    last_positive_B = (cumulative_BN < cumulative_BN[:, -1:]).sum(-1)
    index_B = torch.minimum(index_B, last_positive_B)
    before_B = (cumulative_BN - weights_BN).gather(1, index_B[:, None])[:, 0]
    return index_B, targets_B - before_B


def _blocks(weights_BV: Tensor) -> Tensor:
    rows, vocab = weights_BV.shape
    if vocab % BLOCK:
        weights_BV = F.pad(weights_BV, (0, BLOCK - vocab % BLOCK))
    return weights_BV.view(rows, -1, BLOCK)


def _draw_truncated(weights_BV: Tensor, total_B: Tensor, params: Sequence[SamplingParams], u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sample within the top-k most likely tokens that are also in the smallest set which holds top_p of the whole mass. SGLang joins the
    two in this way; transformers and vLLM take top_p of what top-k has left."""
    vocab = weights_BV.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    kept_BS, ids_BS = weights_BV.topk(max(top_k), dim=-1)  # sorted, most likely first
    kept_BS = kept_BS.double()
    device = weights_BV.device
    k_B1 = torch.tensor(top_k, device=device)[:, None]
    kept_BS = kept_BS.masked_fill(torch.arange(kept_BS.shape[1], device=device)[None] >= k_B1, 0.0)
    top_p_B1 = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)[:, None]
    before_BS = kept_BS.cumsum(-1) - kept_BS
    outside_BS = (before_BS >= top_p_B1 * total_B[:, None]) & (top_p_B1 < 1)
    kept_BS = kept_BS.masked_fill(outside_BS, 0.0)
    mass_B = kept_BS.sum(-1)
    index_B, _ = inverse_cdf(kept_BS, u_B * mass_B)
    tokens_B = ids_BS.gather(1, index_B[:, None])[:, 0]
    return tokens_B, (1.0 - mass_B / total_B).clamp_min(0.0).float()
