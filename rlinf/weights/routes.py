"""Decides which replica of the actor feeds which engine, and by which transport. Pure functions: nodes in, feeds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARED_MEMORY = "shared_memory"  # written once on a node, mapped by all its engines
OBJECT_STORE = "object_store"  # Ray carries the buckets to other nodes, to each node once
DISK = "disk"  # files in a folder that all nodes see
DEVICE_IPC = "device_ipc"  # buckets in memory of the device that engine and actor share
BROADCAST = "broadcast"  # a process group of each publisher and the engines that it feeds
AUTO = "auto"  # SHARED_MEMORY on a node, OBJECT_STORE between nodes; see also device_feeds

DeviceAddress = tuple[int, int]  # (node, index on the node)


@dataclass(frozen=True)
class Feed:
    """Where one engine gets its weights from: a data-parallel replica of the actor, and a transport."""

    replica: int
    transport: str


@dataclass(frozen=True, order=True)
class BroadcastGroup:
    """The members of a process group: as member 0 the actor rank that publishes a stage of a replica, then the engines that this replica
    feeds.

    engine_ranks: how many members each engine is: its tensor-parallel ranks where they are members themselves, 1 where its worker is.
    """

    replica: int
    stage: int
    publisher: int
    engines: tuple[int, ...]
    engine_ranks: int = 1

    @property
    def name(self) -> str:
        return f"replica {self.replica}, stage {self.stage}"

    @property
    def members(self) -> tuple[str, ...]:
        return (f"actor rank {self.publisher}", *(name for engine in self.engines for name in self.names_of(engine)))

    def names_of(self, engine: int) -> tuple[str, ...]:
        """The members that belong to one engine; they are next to each other in `members`."""
        if self.engine_ranks == 1:
            return (f"rollout rank {engine}",)
        return tuple(f"rollout rank {engine} (TP rank {k})" for k in range(self.engine_ranks))


def plan_feeds(publishers: Sequence[Sequence[int]], engines: Sequence[int], transport: str = AUTO) -> tuple[Feed, ...]:
    """One feed for each engine.

    publishers[d][p] is the node of the rank that publishes pipeline stage p of replica d; engines[e] is the node of engine e. The replica
    with most stages on the engine's node feeds it; of several, the first. AUTO: through shared memory if all its stages are on that node,
    otherwise through the object store.
    """
    feeds = []
    for node in engines:
        here = [sum(n == node for n in stages) for stages in publishers]
        nearest = here.index(max(here))
        near = SHARED_MEMORY if here[nearest] == len(publishers[nearest]) else OBJECT_STORE
        feeds.append(Feed(nearest, near if transport == AUTO else transport))
    return tuple(feeds)


def device_feeds(publishers: Sequence[Sequence[DeviceAddress]], engines: Sequence[Sequence[DeviceAddress]]) -> tuple[Feed, ...] | None:
    """One feed for each engine by DEVICE_IPC, or None when an engine has no replica all of whose publishers are on its own devices.

    publishers[d][p] is the device of the rank that publishes pipeline stage p of replica d; engines[e] are the devices of engine e. An
    engine does not open memory of devices that it does not use: whether it could depends on the devices that its processes can see.
    """
    near = [next((Feed(d, DEVICE_IPC) for d, stages in enumerate(publishers) if {*stages} <= {*own}), None) for own in engines]
    return None if None in near else tuple(feed for feed in near if feed)


def broadcast_groups(feeds: Sequence[Feed], width: int, pp: int, dp: int, engine_ranks: int = 1) -> tuple[BroadcastGroup, ...]:
    """The groups of a run, sorted by replica, then stage. Every process makes the groups of which it is a member in this order.

    Making a group waits for all its members. Two processes that made the same two groups in different orders would wait for each other
    forever; in one order for all this cannot happen, since nobody who belongs to the first group that is not yet made waits for another
    one.
    """
    fed: dict[int, list[int]] = {}
    for engine, feed in enumerate(feeds):
        if feed.transport == BROADCAST:
            fed.setdefault(feed.replica, []).append(engine)
    groups = [
        BroadcastGroup(d, stage, publisher(d, stage, width, dp), tuple(engines), engine_ranks)
        for d, engines in fed.items()
        for stage in range(pp)
    ]
    return tuple(sorted(groups))


def publisher(replica: int, stage: int, width: int, dp: int) -> int:
    """The rank that publishes a stage of a replica: the first of the `width` tensor- and context-parallel ranks that hold it
    (rank order: TP fastest, then CP, then DP, then PP)."""
    return width * (replica + dp * stage)
