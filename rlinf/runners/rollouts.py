"""Groups on demand: each goes to the engine with most room and is judged as soon as it is complete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property

from rlinf.cluster.group import Ref, WorkerGroup, gather_or_cancel
from rlinf.config.schema import Config
from rlinf.data.records import Finish, GroupHeader
from rlinf.errors import WorkerLost
from rlinf.metrics.timers import Timers
from rlinf.rollout.contract import EngineStats, GenerateRequest, Stop
from rlinf.runners.engines import Engines
from rlinf.runners.requests import GroupRequest
from rlinf.runners.step_metrics import engine_metrics, engine_speed_metrics
from rlinf.scheduling.dispatcher import Dispatcher
from rlinf.weights.architecture import Architecture, open_architecture

Scored = tuple[GroupHeader, Ref]  # what the driver sees of a group, and where its tokens are


class Rollouts:
    """Seen from the driver a group is two remote calls; its tokens never pass here.

    in_flight: group -> who has it now. timers: where the seconds of groups go.
    """

    def __init__(self, config: Config, rollout: WorkerGroup, reward: WorkerGroup, stop: Stop, timers: Timers | None = None) -> None:
        self.rollout, self.reward, self.stop, self.timers = rollout, reward, stop, timers or Timers()
        self.tracing = False
        self.config = config
        self.max_new_tokens = config.algorithm.sampling_params.max_new_tokens
        self.dispatcher = Dispatcher(rollout.size, config.rollout.max_running_requests, config.algorithm.group_size)
        self.engines = Engines(rollout, self.dispatcher, config.rollout.stall_timeout)
        self.in_flight: dict[str, str] = {}
        self.lengths: dict[str, float] = {}  # prompt -> mean length of its last responses
        self.unfinished: dict[str, Ref] = {}  # group -> its tokens so far, where an engine let go of it
        self._going = asyncio.Event()
        self._going.set()

    async def all(self, wanted: Sequence[GroupRequest]) -> list[Scored]:
        """The groups in the order of `wanted`."""
        return await gather_or_cancel([self.one(group) for group in wanted])

    async def held_out(self, wanted: Sequence[GroupRequest]) -> list[Scored]:
        """As all(), of problems that no step learns from: what the engines count for them is in no step's measure. Only where groups of a
        step are decoded meanwhile can the two not be told apart."""
        scored = await self.all(wanted)
        if not any(self.dispatcher.load):
            await self.engines.ask_all("stats")
        return scored

    async def one(self, group: GroupRequest, pausable: bool = False) -> Scored:
        """One group. pausable: it stops while the engines are paused, and goes on where it was."""
        header, tokens, rank = await self._generated(group, pausable)
        self.in_flight[group.name] = f"reward rank {rank % self.reward.size} ({group.described})"
        with self.timers.phase(group.timer):
            verdicts = await self.reward.call(rank % self.reward.size, "judge", tokens, group.dump)
        del self.in_flight[group.name]
        self.lengths[group.prompt.prompt_id] = mean_length(header)
        return header.with_verdicts(verdicts), tokens

    async def _generated(self, group: GroupRequest, pausable: bool) -> tuple[GroupHeader, Ref, int]:
        request = GenerateRequest(group.name, group.prompt.token_ids, group.n, group.sampling, self.stop, self.max_new_tokens)
        while True:
            if pausable:
                await self._going.wait()
            async with self.dispatcher.seat(group.n, self.lengths.get(group.prompt.prompt_id, 0.0)) as rank:
                if pausable and not self._going.is_set():
                    continue
                self.in_flight[group.name] = f"rollout rank {rank} ({group.described})"
                before = (self.unfinished[group.name],) if group.name in self.unfinished else ()
                header_ref, tokens = self.rollout.ref(rank, "generate", request, group.prompt, *before, returns=2)
                with self.timers.phase(group.timer):
                    header = await self.engines.group_of(rank, header_ref)
            if isinstance(header, WorkerLost):
                await self.engines.revive(rank, header)
                continue
            if Finish.ABORT not in header.finishes:
                self.unfinished.pop(group.name, None)
                return header, tokens, rank
            self.unfinished[group.name] = tokens

    def metrics(self, generated: Sequence[GroupHeader], stats: Sequence[EngineStats]) -> dict[str, float]:
        """How fast the engines were. stats: what each of them counted while `generated` was made."""
        metrics = {"rollout/engine_restarts": float(self.engines.restarted)} | engine_metrics(stats)
        if any(s.busy_seconds for s in stats):
            devices = self.rollout.size * self.config.rollout.tensor_parallel_size
            metrics |= engine_speed_metrics(generated, stats, self.arch, devices, self.config.runner.peak_tflops)
        return metrics

    async def begin_trace(self, step: int) -> None:
        """The engines are recorded in the steps of runner.profile_steps."""
        self.tracing = step in self.config.runner.profile_steps
        if self.tracing:
            await self.engines.ask_all("start_trace", step)

    async def end_trace(self) -> None:
        if self.tracing:
            await self.engines.ask_all("stop_trace")
        self.tracing = False

    @cached_property
    def arch(self) -> Architecture:
        return open_architecture(self.config.rollout.model_dir)

    async def pause(self) -> None:
        """The engines let go of every pausable group that is not finished; their tokens are kept."""
        self._going.clear()
        while any(self.dispatcher.load):  # a call may have been on its way when the engine was asked
            await self.engines.ask_all("abort")
            await asyncio.sleep(0.01)

    def resume(self) -> None:
        self._going.set()


def mean_length(header: GroupHeader) -> float:
    return sum(header.response_lengths) / len(header.response_lengths)
