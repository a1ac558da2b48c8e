"""Groups on demand: each goes to the engine with most room and is judged as soon as it is complete."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlinf.cluster.group import Ref, WorkerGroup, gather_or_cancel
from rlinf.config.schema import Config
from rlinf.data.records import Finish, GroupHeader, Prompt
from rlinf.metrics.timers import Timers
from rlinf.rollout.contract import EngineStats, GenerateRequest, SamplingParams, Stop
from rlinf.runners.engines import Engines
from rlinf.scheduling.dispatcher import Dispatcher
from rlinf.scheduling.flops import Work, forward_flops, generation_work
from rlinf.weights.architecture import Architecture, read_architecture

Scored = tuple[GroupHeader, Ref]  # what the driver sees of a group, and where its tokens are


@dataclass(frozen=True)
class Order:
    """A group that is wanted: n samples of a prompt.

    dump: the file that its samples are written to, for people to read. timer: the phase of the loop that its seconds belong to.
    """

    name: str
    prompt: Prompt
    n: int
    sampling: SamplingParams
    dump: str
    timer: str = "rollout"

    @property
    def samples(self) -> str:
        return f"samples {self.name}/0 to {self.n - 1}"


class Rollouts:
    """Seen from the driver a group is two remote calls; its tokens never pass here.

    in_flight: group -> who has it now. stats: what each engine counted in the last measured step. timers: where the seconds of groups go.
    """

    def __init__(self, config: Config, rollout: WorkerGroup, reward: WorkerGroup, stop: Stop, timers: Timers | None = None) -> None:
        self.rollout, self.reward, self.stop, self.timers = rollout, reward, stop, timers or Timers()
        self.stats: list[EngineStats] = []
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

    async def all(self, orders: Sequence[Order]) -> list[Scored]:
        """The groups in the order of `orders`."""
        return await gather_or_cancel([self.one(order) for order in orders])

    async def one(self, order: Order, pausable: bool = False) -> Scored:
        """One group. pausable: it stops while the engines are paused, and goes on where it was."""
        header, tokens, rank = await self._generated(order, pausable)
        self.in_flight[order.name] = f"reward rank {rank % self.reward.size} ({order.samples})"
        with self.timers.phase(order.timer):
            verdicts = await self.reward.call(rank % self.reward.size, "judge", tokens, order.dump)
        del self.in_flight[order.name]
        self.lengths[order.prompt.prompt_id] = mean_length(header)
        return header.with_verdicts(verdicts), tokens

    async def _generated(self, order: Order, pausable: bool) -> tuple[GroupHeader, Ref, int]:
        request = GenerateRequest(order.name, order.prompt.token_ids, order.n, order.sampling, self.stop, self.max_new_tokens)
        while True:
            if pausable:
                await self._going.wait()
            async with self.dispatcher.seat(order.n, self.lengths.get(order.prompt.prompt_id, 0.0)) as rank:
                if pausable and not self._going.is_set():
                    continue
                self.in_flight[order.name] = f"rollout rank {rank} ({order.samples})"
                before = (self.unfinished[order.name],) if order.name in self.unfinished else ()
                header_ref, tokens = self.rollout.ref(rank, "generate", request, order.prompt, *before, returns=2)
                with self.timers.phase(order.timer):
                    header, loss = await self.engines.group_of(rank, header_ref)
            if header is None:
                await self.engines.revive(rank, loss)
                continue
            if Finish.ABORT not in header.finishes:
                self.unfinished.pop(order.name, None)
                return header, tokens, rank
            self.unfinished[order.name] = tokens

    def measure(self, generated: Sequence[GroupHeader], stats: Sequence[EngineStats]) -> dict[str, float]:
        """How fast the engines were, by what they counted in the step, and what the step got from them."""
        self.stats = [*stats]
        decoded, busy = sum(s.decoded_tokens for s in stats), max(s.busy_seconds for s in stats)
        metrics = {
            "rollout/engine_restarts": float(self.engines.restarted),
            "rollout/reused_tokens": float(sum(s.reused_tokens for s in stats)),
            "rollout/truncated_mass": sum(s.truncated_mass for s in stats) / max(1, decoded),
            "perf/rollout_tokens_per_second": decoded / busy if busy else 0.0,
            "perf/rollout_memory_gib": max(self.memory) / 2**30,
        }
        if busy:
            work = sum((generation_work(h.prompt_length, h.response_lengths) for h in generated), Work())
            devices = self.rollout.size * self.config.rollout.tensor_parallel_size
            speed = forward_flops(self.arch, work) / devices / busy
            metrics["perf/rollout_tflops"] = speed / 1e12
            peak = self.config.runner.peak_tflops
            if peak := peak * 1e12 if peak else stats[0].peak_flops:
                metrics["perf/rollout_mfu"] = speed / peak
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

    @property
    def memory(self) -> list[int]:
        """Peak bytes of each rank."""
        return [s.memory_bytes for s in self.stats]

    @cached_property
    def arch(self) -> Architecture:
        return read_architecture(json.loads(Path(self.config.rollout.model_dir, "config.json").read_text()))

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
