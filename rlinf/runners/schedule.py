"""When the groups of a step are generated, as the loop asks for it. The two answers are schedule_logical and schedule_wallclock, by
algorithm.schedule: with algorithm.max_staleness 0 just before the step, with more ahead of it, while the actor trains.

Version i is the weights after step i; eta is algorithm.max_staleness. In each step the loop calls, in this order: take, before_training,
before_sync and, when there is a checkpoint, save.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlinf.cluster.group import Ref, WorkerGroup
from rlinf.data.records import Verdict
from rlinf.runners.requests import GroupRequest
from rlinf.runners.rollouts import Scored
from rlinf.runners.selection import StepBatch

Requests = Callable[[int, Sequence[int], Counter[str]], list[GroupRequest]]  # (step, prompts, how often the step has taken each)


class Schedule(Protocol):
    """Gives the loop its batches. exhausted: whether the data hold no further batch. total_steps: of the run."""

    total_steps: int

    @property
    def exhausted(self) -> bool: ...

    async def take(self, step: int) -> StepBatch:
        """The groups of `step`; the engines hold the weights of step - 1."""
        ...

    async def before_training(self) -> None:
        """Return when the actor may have the devices."""
        ...

    async def before_sync(self) -> None:
        """Return when the engines may be given the next weights."""
        ...

    async def save(self, folder: Path) -> dict[str, Any]:
        """Write the groups that wait into `folder`. Returns what restore() needs besides them, as JSON values."""
        ...

    async def restore(self, folder: Path, state: dict[str, Any], step: int) -> None:
        """Go on after `step` with what save() wrote and returned. A state in which no group waits may come from another schedule, and from
        other batch sizes."""
        ...


class GroupsOnDisk:
    """Groups that wait in a checkpoint, in one file each; reward workers write and read them. samples: the path of a step's samples."""

    def __init__(self, reward: WorkerGroup, samples: Callable[[int], Path]) -> None:
        self.reward, self.samples, self.turn = reward, samples, 0

    async def put(self, folder: Path, name: str, tokens: Ref, verdicts: tuple[Verdict | None, ...] = ()) -> None:
        await self.reward.call(self._next(), "keep", str(folder / f"{name}.safetensors"), tokens, verdicts)

    async def get(self, folder: Path, name: str, step: int | None = None) -> Scored:
        """step: only for a group that was already judged, the step that it was begun for: its samples and journal are written again, since
        the files from before the resumption are set aside or in another folder."""
        dump = None if step is None else str(self.samples(step))
        header, tokens = self.reward.ref(self._next(), "fetch", str(folder / f"{name}.safetensors"), dump, returns=2)
        return await header, tokens

    def _next(self) -> int:
        self.turn += 1
        return self.turn % self.reward.size
