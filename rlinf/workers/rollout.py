"""The rollout worker: owns one engine, and generates one group for each call."""

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
from rlinf.files import write_visible
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
from rlinf.workers.rollout_part import meeting_file, nodes_of_engine

FAREWELL = 1.0  # seconds between the death of the engine's server and the end of this process, for answers to reach the driver


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
            file = meeting_file(self.folder, address.rank, address.run_id)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_visible(file, node.address)
        self.engine = build_engine(config, tokenizer, self.device.type, log, address.run_id, self._leave if replaceable else None, node)
        if config.rollout.offload and not self.engine.capabilities.sleep:
            raise UserError("rollout.offload: this engine gives no memory back (SGLang does on a GPU); set it to false")

    async def generate(self, request: GenerateRequest, prompt: Prompt, before: Group | None = None) -> tuple[GroupHeader, Group]:
        """The group of a prompt, samples in the order of their index.

        before: the group as it was when it was aborted; its unfinished samples are continued.
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
            await asyncio.Event().wait()  # this process is about to end; the driver must see that (WorkerLost), not this error
        group = Group(request.request_id, prompt, tuple(samples[name] for name in request.sample_ids))
        return group.header(), group

    async def abort(self) -> None:
        """End every running generate() with the tokens that it has."""
        await self.engine.abort()

    async def load_weights(
        self, source: WeightSource | Collective, version: int, *stages: tuple[np.ndarray, ...]
    ) -> tuple[Receipt, EngineStats]:
        async with self.loading:  # an engine that was restarted in the middle of a sync is given the weights twice
            receipt = await self._load_weights(source, version, stages)
        return receipt, await self.stats()

    async def _load_weights(self, source: WeightSource | Collective, version: int, stages: Sequence[tuple[np.ndarray, ...]]) -> Receipt:
        """Engines read buckets: what comes from another node, as arrays or by broadcast, is first written to this node's shared memory. An
        engine that is itself a member of broadcast groups is given the source as it is."""
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
        """Join the broadcast groups of the replica that feeds this engine, in their order; returns when all their members have joined."""
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
        """Free memory (rollout.contract.RolloutEngine.sleep). The KV cache is allocated again by the next request, weights by the next
        load_weights; by then the actor has freed the device."""
        await self.engine.sleep(frozenset(tags))
        self.asleep = True

    async def _wake(self) -> None:
        async with self.waking:
            if self.asleep:
                await self.engine.wake(frozenset({"kv"}))
                self.asleep = False

    async def stats(self) -> EngineStats:
        """The engine's counters, with the peak memory of this process or device, and the data sheet's operations per second."""
        return replace(self.engine.stats(), memory_bytes=peak_memory(self.device), peak_flops=peak_flops(self.device))

    async def start_trace(self, step: int) -> None:
        if self.traced:
            await self.engine.start_trace(self.folder / "profile", f"step_{step:06d}-rollout-{self.address.rank}")

    async def stop_trace(self) -> None:
        await self.engine.stop_trace()

    def close(self) -> None:
        self.engine.close()

    def _leave(self) -> None:
        """Called when the engine's server has died: this process ends a moment later, when what was decoded has reached the driver, which
        then restarts both."""
        threading.Timer(FAREWELL, os._exit, (1,)).start()


def unfinished(request: GenerateRequest, before: Group) -> GenerateRequest:
    """The request for the samples of `before` that were aborted, with their tokens as prefixes."""
    left = [(k, s.token_ids) for k, s in enumerate(before.samples) if s.finish is Finish.ABORT]
    return replace(request, n=len(left), indices=tuple(k for k, _ in left), prefixes=tuple(ids for _, ids in left))
