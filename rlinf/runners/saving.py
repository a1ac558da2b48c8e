"""Writes the checkpoints of a running loop: at once, or (runner.async_checkpoint) in the background, completed at a later step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from rlinf.cluster.group import WorkerGroup
from rlinf.run_folder.folder import RunFolder


class Saving:
    """At most one checkpoint is in the background at a time.

    It becomes `latest` only when every rank of `groups` (actor, critic) has written and checked its part.

    written: whether all ranks have their files on disk, according to their last reports; complete() then does not wait.
    """

    def __init__(self, folder: RunFolder, groups: Sequence[WorkerGroup], background: bool) -> None:
        self.folder, self.groups, self.background = folder, groups, background
        self.pending: tuple[Path, dict[str, Any]] | None = None
        self.written = False

    async def save(self, step: int, describe: Callable[[Path], Awaitable[dict[str, Any]]]) -> None:
        """Write the checkpoint of `step`, or begin to; an earlier one in the background is completed first.

        describe: called with the folder of the checkpoint; returns the run's state, and may write files of its own into the folder.
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
        """Wait for the checkpoint in the background, if there is one, and make it the latest."""
        if self.pending is not None:
            for group in self.groups:
                await group.call_all("finish_save")
            self.folder.finish_checkpoint(*self.pending)
            self.pending, self.written = None, False
