"""algorithm.schedule: logical. Batch by batch, in a fixed order, so that a run can be reproduced."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from pathlib import Path
from typing import Any

from rlinf.config.schema import Config
from rlinf.data.group_file import header_from_json
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
            held = {h.group_id: (f"{len(waiting):02d}-{i:05d}", h, ref) for i, (h, ref) in enumerate([*batch.scored, *batch.spare])}
            await asyncio.gather(*(self.on_disk.put(folder, name, ref, h.verdicts) for name, h, ref in held.values()))
            scored, generated = ([held[h.group_id][0] for h in headers] for headers in ((h for h, _ in batch.scored), batch.generated))
            waiting.append({"scored": scored, "generated": generated, "metrics": batch.metrics})
        return {"begun": self.last_begun, "waiting": waiting}

    async def restore(self, folder: Path, state: dict[str, Any], step: int) -> None:
        waiting = state.get("waiting", [])
        self.last_begun = step + len(waiting)
        for at, kept in enumerate(waiting, step + 1):
            names = [g for g in kept["generated"] if isinstance(g, str)]  # an older checkpoint has only headers of those not trained on
            found = dict(zip(names, await asyncio.gather(*(self.on_disk.get(folder, name, at) for name in names))))
            generated = [found[g][0] if isinstance(g, str) else header_from_json(g) for g in kept["generated"]]
            scored, spare = [found.pop(name) for name in kept["scored"]], [*found.values()]
            ready: asyncio.Future[StepBatch | None] = asyncio.get_running_loop().create_future()
            ready.set_result(StepBatch(scored, generated, kept["metrics"], spare))
            self.batches.append(ready)
