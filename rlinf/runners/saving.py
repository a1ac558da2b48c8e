"""Checkpoints of a running loop: in the foreground, or begun at a step and completed at a later one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from rlinf.cluster.group import WorkerGroup
from rlinf.runners.run_folder import RunFolder


class Saving:
    """At most one checkpoint is on its way.

    It counts, and `latest` points to it, when every rank of `groups` (the actor, the critic) has written and checked its part.

    written: whether complete() would find the files of all ranks on disk, as they said in their last report.
    """

    def __init__(self, folder: RunFolder, groups: Sequence[WorkerGroup], background: bool) -> None:
        self.folder, self.groups, self.background = folder, groups, background
        self.pending: tuple[Path, dict[str, Any]] | None = None
        self.written = False

    async def save(self, step: int, describe: Callable[[Path], Awaitable[dict[str, Any]]]) -> None:
        """Write the checkpoint of `step`, or begin to; one that is on its way is completed first.

        describe: gives the run's state, and may write files of its own into the folder.
        """
        await self.complete()
        partial = self.folder.checkpoints.begin(step)
        state = await describe(partial)
        for group in self.groups:
            await group.call_all("save", str(partial))
        if self.background:
            self.pending = (partial, state)
        else:
            self.folder.finish_checkpoint(partial, state)

    def ready(self, last: bool) -> bool:
        """Whether it is time for complete(): the files are written, or the run ends with this step."""
        return self.pending is not None and (self.written or last)

    async def complete(self) -> None:
        """Wait for the checkpoint that is on its way, if any."""
        if self.pending is not None:
            for group in self.groups:
                await group.call_all("finish_save")
            self.folder.finish_checkpoint(*self.pending)
            self.pending, self.written = None, False
