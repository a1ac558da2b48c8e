"""Which replica of the actor feeds which engine, and how the bytes get there. Pure: nodes in, feeds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARED_MEMORY = "shared_memory"  # written once on a node, mapped by all its engines
OBJECT_STORE = "object_store"  # Ray carries the buckets to other nodes, to each node once


@dataclass(frozen=True)
class Feed:
    """Where one engine gets its weights: the data-parallel replica of the actor, and the transport."""

    replica: int
    transport: str


def plan_feeds(publishers: Sequence[Sequence[int]], engines: Sequence[int]) -> tuple[Feed, ...]:
    """One feed for each engine.

    publishers[d][p] is the node of the rank that publishes pipeline stage p of replica d; engines[e] is the node of engine e. A replica that
    lies wholly on the engine's node feeds it through shared memory; otherwise the one with most stages there feeds it through the object
    store. Of equals the first.
    """
    feeds = []
    for node in engines:
        here = [sum(n == node for n in stages) for stages in publishers]
        nearest = here.index(max(here))
        feeds.append(Feed(nearest, SHARED_MEMORY if here[nearest] == len(publishers[nearest]) else OBJECT_STORE))
    return tuple(feeds)


def publisher(replica: int, stage: int, tp: int, dp: int) -> int:
    """The rank that publishes a stage of a replica: its first tensor-parallel rank (rank order: TP fastest, then DP, then PP)."""
    return tp * (replica + dp * stage)
