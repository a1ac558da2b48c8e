"""Outcome advantages: the reward of a response compared with the other responses to the same prompt, then whitened over the batch.

Numpy in float64: they are computed in the driver, from the numbers in group headers; no tokens are needed.
Legend: G responses of one group, B responses of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature

import numpy as np

from rlinf.errors import UserError

GRPO_EPS = 1e-6
WHITEN_EPS = 1e-5
ROUNDING = 1e-12  # a sum below this share of its terms' magnitudes is 0 but for rounding


def grpo(rewards_G: np.ndarray) -> np.ndarray:
    """(R - mean) / (std + 1e-6) with the sample standard deviation, ddof = 1 (arXiv 2402.03300; the form RLinf and verl use)."""
    centred_G = centred(rewards_G)
    return centred_G / (np.sqrt((centred_G**2).sum() / (len(centred_G) - 1)) + GRPO_EPS)


def rloo(rewards_G: np.ndarray) -> np.ndarray:
    """R minus the mean of the *other* rewards = G/(G-1) * (R - mean) (arXiv 2402.14740)."""
    group_size = len(rewards_G)
    return centred(rewards_G) * group_size / (group_size - 1)


def centred(rewards_G: np.ndarray) -> np.ndarray:
    """R - mean, no division (Dr.GRPO, arXiv 2503.20783; REINFORCE++-baseline, arXiv 2501.03262, which then whitens over the batch).

    Equal rewards give exactly 0, not the rounding error of a mean.
    """
    if np.all(rewards_G == rewards_G[0]):
        return np.zeros(len(rewards_G))
    return rewards_G - rewards_G.mean()


def raw_reward(rewards_G: np.ndarray) -> np.ndarray:
    """R itself. The baseline comes later: the batch mean, by whitening (REINFORCE++, arXiv 2501.03262), or a critic's value (GAE)."""
    return rewards_G


Estimator = Callable[..., np.ndarray]
ADVANTAGES: dict[str, Estimator] = {
    "grpo": grpo,
    "rloo": rloo,
    "dr_grpo": centred,
    "reinforce++-baseline": centred,
    "reinforce++": raw_reward,
    "gae": raw_reward,
}
COMPARING = frozenset(ADVANTAGES) - {"reinforce++", "gae"}  # estimators that need at least two responses of a prompt


def outcome_advantages(
    rewards: Sequence[Sequence[float]],
    loss_tokens: Sequence[Sequence[int]],
    adv_type: str,
    normalize: bool,
    own: Estimator | None = None,
) -> list[np.ndarray]:
    """For each group an array with one advantage for each response; with `normalize`, whitened over all response tokens of the batch.

    rewards, loss_tokens: for each group a sequence with a number for each response. own: the user's own estimator, where adv_type names
    one; with a second parameter without a default it is given the loss tokens of the group too.
    Raises ValueError for a reward that is not finite, and for a group of one response if adv_type compares responses;
    UserError when a user's estimator does not return one finite number for each response.
    """
    estimate, groups = own or ADVANTAGES[adv_type], []
    sees_tokens = sum(p.default is p.empty for p in signature(estimate).parameters.values()) > 1
    for index, (group, tokens) in enumerate(zip(rewards, loss_tokens, strict=True)):
        rewards_G = np.asarray(group, dtype=np.float64)
        if len(rewards_G) < 2 and adv_type in COMPARING:
            raise ValueError(f"group {index} has {len(rewards_G)} response(s); {adv_type} compares responses and needs at least 2")
        if not np.isfinite(rewards_G).all():
            raise ValueError(f"group {index} has a reward that is not finite: {rewards_G.tolist()}")
        given = (rewards_G, np.asarray(tokens, dtype=np.float64)) if sees_tokens else (rewards_G,)
        advantages_G = np.asarray(estimate(*given), dtype=np.float64)
        if advantages_G.shape != rewards_G.shape or not np.isfinite(advantages_G).all():
            raise UserError(
                f"algorithm.adv_type: {adv_type} made {advantages_G.tolist()} of the rewards {rewards_G.tolist()}; "
                "it must return one finite number for each"
            )
        groups.append(advantages_G)
    if not normalize or not groups:
        return groups
    white_B = whiten(np.concatenate(groups), np.concatenate([np.asarray(n, dtype=np.float64) for n in loss_tokens]))
    return np.split(white_B, np.cumsum([len(g) for g in groups])[:-1])


def whiten(advantages_B: np.ndarray, loss_tokens_B: np.ndarray) -> np.ndarray:
    """(A - mean) / (std + 1e-5), with mean and std over the response *tokens*: the weight of a response is the number of its loss tokens.

    It uses the population variance (divided by the number of tokens), as AReaL and RLinf do. Because it re-centres, an advantage of 0 may
    become another value; where the mean is 0 up to rounding, as when all responses are equally long, it stays exactly 0.
    Without tokens, or when all advantages are equal, the result is exactly 0.
    """
    tokens = loss_tokens_B.sum()
    counted_B = advantages_B[loss_tokens_B > 0]
    if tokens == 0 or np.all(counted_B == counted_B[0]):
        return np.zeros(len(advantages_B))
    weighted_B = loss_tokens_B * advantages_B
    mean = mean_of(weighted_B.sum(), np.abs(weighted_B).sum(), tokens)
    variance = (loss_tokens_B * (advantages_B - mean) ** 2).sum() / tokens
    return (advantages_B - mean) / (np.sqrt(variance) + WHITEN_EPS)


def mean_of(total: float, magnitude: float, count: float) -> float:
    """total / count, but exactly 0 where the total is only rounding error beside `magnitude`, the sum of absolute values."""
    return total / count if abs(total) > ROUNDING * magnitude else 0.0
