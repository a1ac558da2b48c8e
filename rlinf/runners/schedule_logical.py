"""algorithm.schedule: logical. Batch by batch, in a fixed order, so that a run can be reproduced."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from pathlib import Path
from typing import Any

from rlinf.config.schema import Config
from rlinf.data.group_file import header_from_json, header_to_json
from rlinf.data.sampler import PromptSampler
from rlinf.runners.rollouts import Rollouts
from rlinf.runners.schedule import GroupsOnDisk, Requests
from rlinf.runners.selection import StepBatch, next_groups


class Logical:
    """Reproducible: the batch of step s is generated under version max(0, s - 1 - eta), and no weights change inside a request.

    With eta = 0 this is the synchronous loop. With more, the engines generate a later batch while the actor trains; the result still does
    not depend on the order in which things happen to finish.
    """

    def __init__(
        self, config: Config, sampler: PromptSampler, rollouts: Rollouts, on_disk: GroupsOnDisk, requests: Requests, total_steps: int
    ) -> None:
        self.algorithm, self.max_epochs = config.algorithm, config.runner.max_epochs
        self.sampler, self.rollouts, self.on_disk, self.requests, self.total_steps = sampler, rollouts, on_disk, requests, total_steps
        self.batches: deque[asyncio.Future[StepBatch | None]] = deque()  # those of the next steps; None: the data were used up
        self.last_begun = 0  # the last step whose batch was begun

    @property
    def exhausted(self) -> bool:
        return not any(batch.done() and batch.result() for batch in self.batches) and self.sampler.exhausted(self.max_epochs)

    async def take(self, step: int) -> StepBatch:
        self.last_begun = max(self.last_begun, step - 1)
        while self.last_begun < min(step + self.algorithm.max_staleness, self.total_steps):
            self.last_begun += 1
            self.batches.append(asyncio.ensure_future(self.produce(self.last_begun, self.batches[-1] if self.batches else None)))
        batch = await self.batches.popleft()
        assert batch is not None, "a step was begun without data"
        return batch

    async def produce(self, step: int, before: asyncio.Future[StepBatch | None] | None) -> StepBatch | None:
        """The batch of `step`, begun when the batch before it is complete: only then is known how many prompts dynamic sampling took."""
        if before is not None:
            await before
            if self.sampler.exhausted(self.max_epochs):
                return None
        taken = Counter[str]()
        return await next_groups(
            self.sampler, self.algorithm, lambda indices: self.rollouts.generate_groups(self.requests(step, indices, taken))
        )

    async def before_training(self) -> None: ...

    async def before_sync(self) -> None:
        for batch in self.batches:
            await batch

    async def save(self, folder: Path) -> dict[str, Any]:
        waiting: list[dict[str, Any]] = []
        for batch in (b for future in self.batches if (b := future.result())):
            names = {header.group_id: f"{len(waiting):02d}-{i:05d}" for i, (header, _) in enumerate(batch.scored)}
            await asyncio.gather(*(self.on_disk.put(folder, names[h.group_id], ref, h.verdicts) for h, ref in batch.scored))
            generated = [names.get(h.group_id) or header_to_json(h) for h in batch.generated]
            waiting.append({"scored": list(names.values()), "generated": generated, "metrics": batch.metrics})
        return {"begun": self.last_begun, "waiting": waiting}

    async def restore(self, folder: Path, state: dict[str, Any], step: int) -> None:
        waiting = state.get("waiting", [])
        self.last_begun = step + len(waiting)
        for at, kept in enumerate(waiting, step + 1):
            scored = dict(zip(kept["scored"], await asyncio.gather(*(self.on_disk.get(folder, name, at) for name in kept["scored"]))))
            generated = [scored[g][0] if isinstance(g, str) else header_from_json(g) for g in kept["generated"]]
            ready: asyncio.Future[StepBatch | None] = asyncio.get_running_loop().create_future()
            ready.set_result(StepBatch(list(scored.values()), generated, kept["metrics"]))
            self.batches.append(ready)
