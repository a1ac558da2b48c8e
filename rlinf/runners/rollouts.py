"""Groups on demand: each goes to the engine with most room and is judged as soon as it is complete."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from rlinf.cluster.group import Ref, WorkerGroup
from rlinf.config.schema import Config
from rlinf.data.records import Finish, GroupHeader, Prompt
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.scheduling.dispatcher import Dispatcher

Scored = tuple[GroupHeader, Ref]  # what the driver sees of a group, and where its tokens are


@dataclass(frozen=True)
class Order:
    """A group that is wanted: n samples of a prompt. dump: the file that its samples are written to, for people to read."""

    name: str
    prompt: Prompt
    n: int
    sampling: SamplingParams
    dump: str


class Rollouts:
    """in_flight: group -> who has it now. Seen from the driver a group is two remote calls; its tokens never pass here."""

    def __init__(self, config: Config, rollout: WorkerGroup, reward: WorkerGroup, stop: Stop) -> None:
        self.rollout, self.reward, self.stop = rollout, reward, stop
        self.max_new_tokens = config.algorithm.sampling_params.max_new_tokens
        self.dispatcher = Dispatcher(rollout.size, config.rollout.max_running_requests, config.algorithm.group_size)
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
        self.in_flight[order.name] = f"reward rank {rank % self.reward.size}"
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
                self.in_flight[order.name] = f"rollout rank {rank}"
                before = (self.unfinished[order.name],) if order.name in self.unfinished else ()
                header_ref, tokens = self.rollout.ref(rank, "generate", request, order.prompt, *before, returns=2)
                header = await header_ref
            if Finish.ABORT not in header.finishes:
                self.unfinished.pop(order.name, None)
                return header, tokens, rank
            self.unfinished[order.name] = tokens

    async def pause(self) -> None:
        """The engines let go of every pausable group that is not finished; their tokens are kept."""
        self._going.clear()
        while any(self.dispatcher.load):  # a call may have been on its way when the engine was asked
            await self.rollout.call_all("abort")
            await asyncio.sleep(0.01)

    def resume(self) -> None:
        self._going.set()


def mean_length(header: GroupHeader) -> float:
    return sum(header.response_lengths) / len(header.response_lengths)


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results in order; the first failure is raised and the rest is cancelled."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
