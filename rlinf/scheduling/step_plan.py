"""How one global batch becomes mini-batches, data-parallel shares and micro-batches: pure logic on headers.

The driver knows every length, so it decides the whole split; ranks need no collective to agree on counts or denominators.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleRef:
    """A sample of the batch: index into RankBatch.group_ids, index in the group, and its (final) scalar advantage."""

    group: int
    index: int
    advantage: float


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step as one DP rank sees it.

    micro_batches: the same number on every DP rank (an empty one runs an inert pass). The denominators are global: over all DP
    ranks and micro-batches of this mini-batch.
    """

    micro_batches: tuple[tuple[SampleRef, ...], ...]
    global_tokens: int
    global_samples: int


@dataclass(frozen=True)
class RankBatch:
    """What one DP rank (all its TP and PP ranks) trains on in one step."""

    group_ids: tuple[str, ...]
    mini_batches: tuple[MiniBatch, ...]
