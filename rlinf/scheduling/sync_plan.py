"""Which ranks of the actor hand out weights, by which transports, and who feeds each engine: decided once, from the seats of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlinf.config.schema import Config
from rlinf.scheduling.placement import Seat, feeds_on_devices, publishers
from rlinf.weights.routes import DEVICE_IPC, BroadcastGroup, Feed, broadcast_groups, plan_feeds


@dataclass(frozen=True)
class SyncPlan:
    """How every version of the weights travels.

    publishers[d][p]: the rank that publishes pipeline stage p of replica d. feeds: by engine. groups: for the transport `broadcast`, in the
    order in which all their members make them. transports: by actor rank, those by which its replica feeds any engine. engines_join:
    whether the engines are members of the groups themselves, and not their workers.
    """

    publishers: tuple[tuple[int, ...], ...]
    feeds: tuple[Feed, ...]
    groups: tuple[BroadcastGroup, ...]
    transports: tuple[tuple[str, ...], ...]
    engines_join: bool

    @property
    def feeding(self) -> list[int]:
        """The actor ranks whose replica feeds an engine: the others have no part in a sync."""
        return [rank for rank, transports in enumerate(self.transports) if transports]


def plan_sync(config: Config, actor: Sequence[Seat], engines: Sequence[Seat]) -> SyncPlan:
    """actor, engines: the seats of the two components, by rank."""
    model, rollout = config.actor.model, config.rollout
    representing = publishers(model, len(actor))
    feeds = feeds_on_devices(config, actor, engines) if rollout.weight_transport == DEVICE_IPC else None
    if feeds is None:
        nodes = [[actor[rank].node for rank in stages] for stages in representing]
        feeds = plan_feeds(nodes, [engine.node for engine in engines], rollout.weight_transport)
    engine_ranks = rollout.tensor_parallel_size if rollout.joins_groups else 1
    groups = broadcast_groups(feeds, model.stage_ranks, model.pipeline_model_parallel_size, len(representing), engine_ranks)
    replica_of = [model.data_parallel_rank(rank, len(actor)) for rank in range(len(actor))]
    transports = tuple(tuple({f.transport: None for f in feeds if f.replica == replica}) for replica in replica_of)
    return SyncPlan(tuple(map(tuple, representing)), feeds, groups, transports, rollout.joins_groups)
