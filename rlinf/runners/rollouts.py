"""Generates and judges groups: each goes to the engine that has the most room, and is judged as soon as it is complete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property

from rlinf.cluster.group import Ref, WorkerGroup, gather_or_cancel
from rlinf.config.schema import Config
from rlinf.data.records import Finish, GroupHeader
from rlinf.errors import WorkerLost
from rlinf.metrics.timers import Timers
from rlinf.rollout.contract import EngineStats, GenerateRequest
from rlinf.runners.engines import Engines
from rlinf.runners.requests import GroupRequest
from rlinf.runners.step_metrics import engine_metrics, engine_speed_metrics
from rlinf.scheduling.dispatcher import Dispatcher
from rlinf.weights.architecture import Architecture, open_architecture

Scored = tuple[GroupHeader, Ref]  # a judged group: what the driver sees of it, and a reference to its tokens
LONGEST_PAUSE = 0.16  # seconds between two requests to an engine to interrupt what it has


class Rollouts:
    """The driver's side of generation, in training and in an evaluation. A group costs two remote calls, `generate` and `judge`; its
    tokens do not pass through the driver.

    in_flight: group -> the worker that has it now. timers: where the seconds of groups are counted.
    """

    def __init__(self, config: Config, rollout: WorkerGroup, reward: WorkerGroup, timers: Timers | None = None) -> None:
        self.rollout, self.reward, self.timers = rollout, reward, timers or Timers()
        self.tracing = False
        self.config = config
        self.dispatcher = Dispatcher(rollout.size, config.rollout.max_running_requests, config.algorithm.group_size)
        self.engines = Engines(rollout, self.dispatcher, config.rollout.stall_timeout)
        self.in_flight: dict[str, str] = {}
        self.lengths: dict[str, float] = {}  # prompt -> mean length of its last responses, which the dispatcher expects again
        self.unfinished: dict[str, Ref] = {}  # group that an engine stopped at before its end -> its tokens so far
        self._going = asyncio.Event()
        self._going.set()
        self._paused_since: float | None = None
        self._paused_seconds = 0.0

    async def generate_groups(self, wanted: Sequence[GroupRequest]) -> list[Scored]:
        """The groups, judged, in the order of `wanted`."""
        return await gather_or_cancel([self.generate_group(group) for group in wanted])

    async def generate_held_out(self, wanted: Sequence[GroupRequest]) -> list[Scored]:
        """As generate_groups(), for held-out problems: what the engines count meanwhile is thrown away, so that it is not in the metrics
        of the next step. While groups of a step are decoded at the same time, the two cannot be told apart, and all is counted."""
        scored = await self.generate_groups(wanted)
        if not any(self.dispatcher.load):
            await self.engines.ask_all("stats")
        return scored

    async def generate_group(self, group: GroupRequest, pausable: bool = False) -> Scored:
        """One group, judged. pausable: pause() interrupts it, and after resume() it goes on from the tokens that it has."""
        header, tokens, rank = await self._generate(group, pausable)
        judge = rank % self.reward.size
        self.in_flight[group.name] = f"reward rank {judge} ({group.described})"
        with self.timers.phase(group.timer):
            verdicts = await self.reward.call(judge, "judge", tokens, group.dump(judge))
        del self.in_flight[group.name]
        self.lengths[group.prompt.prompt_id] = mean_length(header)
        return header.with_verdicts(verdicts), tokens

    async def _generate(self, group: GroupRequest, pausable: bool) -> tuple[GroupHeader, Ref, int]:
        """(header without verdicts, tokens, the engine that finished it); asked again where an engine dies or is paused."""
        request = GenerateRequest(group.name, group.prompt.token_ids, group.n, group.sampling, group.stop, group.max_new_tokens)
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
        """How fast the engines were. stats: what each of them counted while it generated its part of `generated`."""
        metrics = {"rollout/engine_restarts": float(self.engines.restarted)} | engine_metrics(stats)
        if any(s.busy_seconds for s in stats):
            devices = self.rollout.size * self.config.rollout.tensor_parallel_size
            metrics |= engine_speed_metrics(generated, stats, self.arch, devices, self.config.runner.peak_tflops)
        return metrics

    async def begin_trace(self, step: int) -> None:
        """Start the engines' profilers, if `step` is one of runner.profile_steps."""
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
        """Interrupt every pausable group that is not finished; the tokens that it has are kept."""
        self._going.clear()
        self._paused_since = self.engine_clock + self._paused_seconds
        seconds = 0.01
        while any(self.dispatcher.load):  # again and again: a call may have been on its way when the engine was asked
            await self.engines.ask_all("abort")
            await asyncio.sleep(seconds)
            seconds = min(2 * seconds, LONGEST_PAUSE)

    def resume(self) -> None:
        """Let the interrupted groups go on."""
        self._paused_seconds, self._paused_since = asyncio.get_running_loop().time() - self.engine_clock, None
        self._going.set()

    @property
    def engine_clock(self) -> float:
        """Seconds since some moment, without those of pauses."""
        now = asyncio.get_running_loop().time() if self._paused_since is None else self._paused_since
        return now - self._paused_seconds


def mean_length(header: GroupHeader) -> float:
    return sum(header.response_lengths) / len(header.response_lengths)
