"""The rollout worker: one engine, called a group at a time."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rlinf.config.schema import Config
from rlinf.data.records import Finish, Group, GroupHeader, Prompt, Sample
from rlinf.data.tokenizer import tokenizer_of
from rlinf.device import choose, peak_memory
from rlinf.errors import UserError
from rlinf.rollout.build import build_engine
from rlinf.rollout.contract import EngineStats, GenerateRequest, GroupMember
from rlinf.rollout.sglang_options import ServerNode
from rlinf.rollout.sglang_server import free_port
from rlinf.scheduling.placement import WorkerAddress
from rlinf.weights.broadcast import Wire, open_store
from rlinf.weights.opening import release
from rlinf.weights.receipts import merge_sources
from rlinf.weights.routes import BroadcastGroup
from rlinf.weights.shared_memory import land
from rlinf.weights.source import Collective, Receipt, SharedMemory, WeightSource
from rlinf.workers.device import peak_flops
from rlinf.workers.rollout_part import meeting_file, nodes_of_engine, tell

FAREWELL = 1.0  # seconds that answers have to reach the driver


class RolloutWorker:
    """Implements workers.interfaces.RolloutWorker; `generate` may run many times at once in one event loop."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        self.address = address
        torch.set_num_threads(address.threads)
        tokenizer = tokenizer_of(config)
        self.folder = config.runner.run_dir
        self.traced = address.rank in config.runner.profile_ranks
        log = self.folder / "workers" / f"rollout-{address.rank}-engine.log"
        self.device = choose(config.cluster.device)
        self.start_timeout = config.cluster.start_timeout
        self.asleep, self.waking, self.loading = False, asyncio.Lock(), asyncio.Lock()
        self.wires: dict[str, Wire] = {}  # by the name of the broadcast group
        self.replaceable = replaceable = config.engine_restarts > 0
        nodes, node = nodes_of_engine(config, address), None
        if nodes > 1:
            node = ServerNode(nodes, 0, f"{address.host}:{free_port(address.host)}")
            tell(meeting_file(self.folder, address.rank, address.run_id), node.address)
        self.engine = build_engine(config, tokenizer, self.device.type, log, address.run_id, self._leave if replaceable else None, node)
        if config.rollout.offload and not self.engine.capabilities.sleep:
            raise UserError("rollout.offload: this engine gives no memory back (SGLang does on a GPU); set it to false")

    async def generate(self, request: GenerateRequest, prompt: Prompt, before: Group | None = None) -> tuple[GroupHeader, Group]:
        """The group of a prompt, samples in the order of their index.

        before: the group as an engine let go of it; it goes on from there.
        """
        await self._wake()
        samples: dict[str, Sample] = {s.sample_id: s for s in before.samples} if before else {}
        try:
            async for sample in self.engine.generate(unfinished(request, before) if before else request):
                name = sample.sample_id
                samples[name] = samples[name].continued_by(sample) if name in samples else sample
        except RuntimeError:
            if not (self.replaceable and self.engine.dead):
                raise
            await asyncio.Event().wait()  # this process is about to end, and that is what the driver is to hear
        group = Group(request.request_id, prompt, tuple(samples[name] for name in request.sample_ids))
        return group.header(), group

    async def abort(self) -> None:
        """Every group that is being generated ends with what it has."""
        await self.engine.abort()

    async def load_weights(
        self, source: WeightSource | Collective, version: int, *stages: tuple[np.ndarray, ...]
    ) -> tuple[Receipt, EngineStats]:
        async with self.loading:  # when it was started anew in the middle of a sync, it is given the weights twice
            receipt = await self._load_weights(source, version, stages)
        return receipt, await self.stats()

    async def _load_weights(self, source: WeightSource | Collective, version: int, stages: Sequence[tuple[np.ndarray, ...]]) -> Receipt:
        """What comes from another node, as arrays or by broadcast, is landed in this one's shared memory first: engines read buckets.
        Unless the engine takes part in broadcasts itself."""
        name = f"{self.address.run_id}-r{self.address.rank}"
        if isinstance(source, Collective) and isinstance(self.engine, GroupMember):
            return await self.engine.load_weights(source, version)
        if isinstance(source, Collective):
            parts = [await asyncio.to_thread(self.wires[group].receive, name, version) for group in source.groups]
            landed, keys = merge_sources([part for part, _ in parts]), {own: sent for _, part in parts for own, sent in part.items()}
        elif isinstance(source, SharedMemory) and stages:
            landed = land(source, [array for stage in stages for array in stage], name, version)
            keys = {own.key: sent.key for sent, own in zip(source.buckets, landed.buckets)}
        else:
            return await self.engine.load_weights(source, version)
        try:
            receipt = await self.engine.load_weights(landed, version)
        finally:
            release(landed)
        return replace(receipt, checksums={keys[own]: checksum for own, checksum in receipt.checksums.items()})

    async def join(self, store: tuple[str, int], groups: Sequence[BroadcastGroup]) -> None:
        """Make the broadcast groups of the replica that feeds this engine, in their order; returns when all their members have."""
        mine = [group for group in groups if self.address.rank in group.engines]
        member, timeout = f"rollout rank {self.address.rank}", self.start_timeout
        if isinstance(self.engine, GroupMember):
            await self.engine.join(store, mine, self.address.rank, timeout)
            return
        for group in mine:
            self.wires[group.name] = await asyncio.to_thread(Wire, group, member, open_store(*store, keeps=False), self.device, timeout)

    async def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        await self._wake()
        return await self.engine.sequence_logprobs(sequences)

    async def sleep(self, tags: Sequence[str]) -> None:
        """Give memory back (rollout.contract.RolloutEngine.sleep). The KV cache comes back with the next request, weights with the next
        load_weights: by then the actor has left the device."""
        await self.engine.sleep(frozenset(tags))
        self.asleep = True

    async def _wake(self) -> None:
        async with self.waking:
            if self.asleep:
                await self.engine.wake(frozenset({"kv"}))
                self.asleep = False

    async def stats(self) -> EngineStats:
        """The engine's, with the peak of this process's or device's memory and what one device promises."""
        return replace(self.engine.stats(), memory_bytes=peak_memory(self.device), peak_flops=peak_flops(self.device))

    async def start_trace(self, step: int) -> None:
        if self.traced:
            await self.engine.start_trace(self.folder / "profile", f"step_{step:06d}-rollout-{self.address.rank}")

    async def stop_trace(self) -> None:
        await self.engine.stop_trace()

    def close(self) -> None:
        self.engine.close()

    def _leave(self) -> None:
        """The engine's server has died. What it had decoded is handed over; then this process ends, and the driver starts both anew."""
        threading.Timer(FAREWELL, os._exit, (1,)).start()


def unfinished(request: GenerateRequest, before: Group) -> GenerateRequest:
    """What is left to do of a request."""
    left = [(k, s.token_ids) for k, s in enumerate(before.samples) if s.finish is Finish.ABORT]
    return replace(request, n=len(left), indices=tuple(k for k, _ in left), prefixes=tuple(ids for _, ids in left))
