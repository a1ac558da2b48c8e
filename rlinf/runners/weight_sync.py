"""Moves the actor's weights to the engines and checks the engines' receipts. Every sync has a version: k = the weights after step k."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlinf.cluster.group import Ref, Shared, WorkerGroup, gather_or_cancel
from rlinf.config.schema import Config
from rlinf.data.records import GroupHeader, Prompt
from rlinf.errors import RunFailed
from rlinf.rollout.contract import EngineStats
from rlinf.runners.engines import Engines
from rlinf.scheduling.sync_plan import plan_sync
from rlinf.weights.receipts import check_probes, check_receipts, merge_sources
from rlinf.weights.routes import OBJECT_STORE, Feed
from rlinf.weights.source import Buckets, Collective, Receipt

PROBES = 4


@dataclass(frozen=True)
class Synced:
    """The outcome of publish(). engine_stats: what each engine counted since the sync before."""

    metrics: dict[str, float]
    engine_stats: list[EngineStats]


Written = tuple[dict[str, Buckets], float]  # what one publisher wrote, by transport, and the seconds that it took


class Moved(NamedTuple):
    """A version that all engines have loaded. sources: what each engine was to read. taken: its receipt and statistics."""

    gather_seconds: float
    sources: list[Buckets]
    taken: list[tuple[Receipt, EngineStats]]


class WeightSync:
    """Moves the actor's weights into all engines, and remembers where the current version can still be read, for a restarting engine."""

    def __init__(self, config: Config, actor: WorkerGroup, engines: Engines, prompts: Sequence[Prompt]) -> None:
        self.config, self.actor, self.engines = config, actor, engines
        rollout, engines.load = engines.group, self.load_again
        self.keep = rollout.deaths_allowed > 0
        self.readable: list[tuple[Shared, list[Ref]]] = []  # where each engine can read the current version; empty when it no longer can
        self.replacing = asyncio.Lock()  # taken while the actor writes a version, so that a restarting engine waits for the new one
        self.probes = [p.token_ids for p in prompts if len(p.token_ids) > 1][:PROBES]
        self.version: int | None = None
        self.syncs = 0
        self.plan = plan_sync(config, actor.seats, rollout.seats)

    async def publish(self, version: int) -> Synced:
        """Bring the actor's weights into every engine as `version`; raises RunFailed unless every receipt is good."""
        # after the first sync the others know that they feed no engine
        ranks = range(self.actor.size) if self.syncs == 0 else self.plan.feeding
        if self.plan.groups and self.syncs == 0:
            await self._join()
        moved = await (self._broadcast(ranks, version) if self.plan.groups else self._offer(ranks, version))
        receipts = [receipt for receipt, _ in moved.taken]
        check_receipts(moved.sources, version, receipts)
        metrics = {
            "sync/gather_seconds": moved.gather_seconds,
            "sync/load_seconds": max(r.seconds for r in receipts),
            "sync/gib": sum(b.nbytes for b in moved.sources[0].buckets) / 2**30,
        }
        expected = await self._actor_logprobs() if self._probes_now() else None
        await self.actor.call_ranks(ranks, "release", self.keep)
        if expected is not None:  # only after the release: the engines may need the device that the actor has just left
            metrics["sync/probe_gap_max"] = await self.probe(version, expected)
        if not self.keep:
            self.forget_sources()
        self.syncs += 1
        return Synced(metrics, [stats for _, stats in moved.taken])

    async def _offer(self, ranks: Sequence[int], version: int) -> Moved:
        """Have the actor write the weights, then every engine read them."""
        async with self.replacing:
            self.forget_sources()
            calls = {rank: self.actor.ref(rank, "publish", version, self.plan.transports[rank], returns=2) for rank in ranks}
            parts = dict(zip(ranks, await self.actor.results([written for written, _ in calls.values()])))
            sources = self._sources(parts)
            offers = {feed: Shared(source) for feed, source in sources.items()}
            for feed in self.plan.feeds:
                payload = [calls[rank][1] for rank in self.plan.publishers[feed.replica]] if feed.transport == OBJECT_STORE else []
                self.readable.append((offers[feed], payload))
            self.version = version
        taken = await self.engines.ask_each("load_weights", [(offer, version, *payload) for offer, payload in self.readable])
        return Moved(gather_seconds(parts), [sources[feed] for feed in self.plan.feeds], taken)

    async def _broadcast(self, ranks: Sequence[int], version: int) -> Moved:
        """Send and receive at the same time; no engine is restarted meanwhile."""
        rounds = (
            2 if self.plan.engines_join and self.syncs == 0 else 1
        )  # the first version is sent twice: SGLang proves that it loads all of it
        async with self.replacing:
            calls = [self.actor.ref(rank, "publish", version, self.plan.transports[rank] * rounds, returns=2) for rank in ranks]
            written, taken = await gather_or_cancel([self.actor.results([written for written, _ in calls]), self._receive(version)])
            parts = dict(zip(ranks, written))
            self.version, sources = version, self._sources(parts)
        return Moved(gather_seconds(parts), [sources[feed] for feed in self.plan.feeds], taken)

    def _sources(self, parts: Mapping[int, Written]) -> dict[Feed, Buckets]:
        """What each feed has to read: all that the publishers of its replica wrote for its transport."""
        return {
            feed: merge_sources([parts[rank][0][feed.transport] for rank in self.plan.publishers[feed.replica]])
            for feed in set(self.plan.feeds)
        }

    def _probes_now(self) -> bool:
        every = self.config.rollout.verify_weights_every
        return self.syncs == 0 or bool(every and self.syncs % every == 0)

    async def _actor_logprobs(self) -> list[np.ndarray]:
        """The actor's side of the probes, of the replica that feeds the first engine; its last stage alone has them."""
        model, replica = self.config.actor.model, self.plan.feeds[0].replica
        ranks = [rank for rank in self.plan.feeding if model.data_parallel_rank(rank, self.actor.size) == replica]
        found = await self.actor.call_ranks(ranks, "sequence_logprobs", self.probes)
        return next(filter(None, found))

    async def _join(self) -> None:
        """Have actor ranks and engines make the broadcast groups that they are members of."""
        store, groups = Shared(await self.actor.call(0, "open_store")), Shared(self.plan.groups)
        sending = self.actor.call_ranks([group.publisher for group in self.plan.groups], "join", store, groups)
        await gather_or_cancel([sending, self.engines.ask_all("join", store, groups)])

    async def _receive(self, version: int) -> list[tuple[Receipt, EngineStats]]:
        """Have every engine receive what its replica broadcasts, one pipeline stage after the other."""
        groups = self.plan.groups
        streams = {d: Shared(Collective(tuple(g.name for g in groups if g.replica == d))) for d in {g.replica for g in groups}}
        return await self.engines.ask_each("load_weights", [(streams[feed.replica], version) for feed in self.plan.feeds])

    def forget_sources(self) -> None:
        """Must be called before the actor frees the weights that it published: from then on they can no longer be read."""
        self.readable = []

    async def load_again(self, engine: int) -> None:
        """Load the current version into an engine that was restarted. When it can no longer be read, the engine gets the next publish()."""
        async with self.replacing:
            if self.readable and self.version is not None:
                offer, payload = self.readable[engine]
                receipt, _ = await self.engines.ask_once(engine, "load_weights", offer, self.version, *payload)
                check_receipts([offer.value], self.version, [receipt])

    async def probe(self, version: int, expected: Sequence[np.ndarray]) -> float:
        """Largest gap between the engines' log-probabilities of the probes and the actor's."""
        engines = await self.engines.ask_all("sequence_logprobs", self.probes)
        precision = self.config.rollout.precision or self.config.actor.model.precision
        return check_probes(version, precision, expected, engines)

    def refuse_foreign_versions(self, headers: Sequence[GroupHeader]) -> None:
        """Every token must come from the weights of the last publish(), or of one of the algorithm.max_staleness before it."""
        if self.version is None:
            raise RunFailed("the engines were given no weights yet")
        known = range(max(0, self.version - self.config.algorithm.max_staleness), self.version + 1)
        for header in headers:
            unknown = {version for sample in header.versions for version, _ in sample} - {*known}
            if unknown:
                raise RunFailed(
                    f"group {header.group_id}: tokens of weight version {sorted(unknown)}, but the engines were given {self.version}"
                    + (f" and may be behind by {len(known) - 1}" if len(known) > 1 else "")
                )


def gather_seconds(parts: Mapping[int, Written]) -> float:
    """Until the slowest publisher had written its part."""
    return max(seconds for _, seconds in parts.values())
