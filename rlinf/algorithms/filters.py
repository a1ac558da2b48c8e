"""Which groups and responses a step learns from: pure functions on the numbers of the group headers."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np


def has_signal(right: Sequence[bool]) -> bool:
    """DAPO's dynamic sampling (arXiv 2503.14476): a group has signal only when some, but not all, of its answers are right.

    It looks at correctness, not at shaped rewards: a length penalty would make the rewards of right answers of different lengths differ.
    """
    return 0 < sum(right) < len(right)


def update_subset(seed: int, group_id: str, group_size: int, n: int) -> np.ndarray:
    """RaML's num_update_sample_per_prompt (arXiv 2505.19815): which n of the group's responses take part in the update (bool).

    Advantages are still computed from all responses. The choice depends on the arguments only, so that every rank and every resumed run
    makes the same; group_id contains the step, so that it differs each time a prompt comes up.
    """
    key = sha256(f"{seed}/{group_id}".encode()).digest()
    chosen = np.random.default_rng(int.from_bytes(key[:8], "big")).permutation(group_size)[: min(n, group_size)]
    mask = np.zeros(group_size, dtype=bool)
    mask[chosen] = True
    return mask
