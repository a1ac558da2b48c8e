"""Reads groups from the journal of an earlier run, which take the place of engines and verifier when a step is trained again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlinf.config.schema import Config
from rlinf.data.journal import read_groups
from rlinf.data.records import Group, GroupHeader
from rlinf.errors import UserError
from rlinf.scheduling.placement import WorkerAddress


class JournalWorker:
    """Implements workers.interfaces.JournalWorker. It reads each file once, and forgets a group when it has returned it."""

    def __init__(self, address: WorkerAddress, config: Config) -> None:
        self.groups: dict[str, dict[str, Group]] = {}  # by file, by group id

    def fetch(self, files: Sequence[str], group_id: str) -> tuple[GroupHeader, Group]:
        """The group, from the first of `files` that has it. Raises UserError when none of them has it."""
        for file in files:
            if file not in self.groups:
                self.groups[file] = {group.group_id: group for group in read_groups(Path(file))}
            if group_id in self.groups[file]:
                group = self.groups[file].pop(group_id)
                return group.header(), group
        raise UserError(
            f"group {group_id} is not in the journal of its run ({', '.join(files) or 'no samples/groups_* file'}): "
            "the step cannot be replayed"
        )
