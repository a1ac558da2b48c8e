"""Checkpoints of a running loop: in the foreground, or begun at a step and completed at a later one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlinf.cluster.group import WorkerGroup
from rlinf.runners.run_folder import RunFolder


class Saving:
    """At most one checkpoint is on its way. It counts, and `latest` points to it, when every rank of actor and critic has written and
    checked its part.

    written: whether complete() would find the files of all ranks on disk, as they said in their last report.
    """

    def __init__(self, folder: RunFolder, actor: WorkerGroup, background: bool, critic: WorkerGroup | None = None) -> None:
        self.folder, self.background = folder, background
        self.groups = [actor] if critic is None else [actor, critic]
        self.pending: tuple[Path, dict[str, Any]] | None = None
        self.written = False

    async def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, or begin to; one that is on its way is completed first."""
        await self.complete()
        partial = self.folder.begin_checkpoint(step)
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
