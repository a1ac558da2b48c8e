"""The steps of an earlier run, as its folder records them: which groups each step trained on, in order, and where their journals are.

samples/order_000012.jsonl    the groups of step 12 in the order of training, and all that were generated for it
samples/groups_000012.jsonl   the groups that were begun for step 12: data/journal.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from rlinf.cluster.group import WorkerGroup
from rlinf.errors import UserError
from rlinf.record_files import TEXTS, whole_rows
from rlinf.run_paths import RunPaths, replaced
from rlinf.runners.rollouts import Scored
from rlinf.runners.selection import StepBatch


class RecordedSteps:
    """A StepSource (runners.training_loop): the steps are given, and there is no state to keep in a checkpoint."""

    def __init__(self, run_dir: Path) -> None:
        self.paths = RunPaths(run_dir)
        self.steps = self.paths.steps_of("order")
        if not self.steps:
            raise UserError(
                f"{run_dir}: no step of this run is journalled (samples/order_*.jsonl); runs of `rlinf train` keep them "
                "unless runner.keep_groups is 0"
            )

    def total_steps(self, max_epochs: int, max_steps: int, done: int = 0, waiting: int = 0) -> int:
        """The last recorded step, or max_steps if that is earlier. The other arguments are those of a sampler, and unused here."""
        return self.steps[-1] if max_steps == -1 else min(self.steps[-1], max_steps)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def order(self, step: int) -> tuple[list[str], list[str]]:
        """(groups to train on, all groups that were generated). Raises UserError when the step is not recorded."""
        if step not in self.steps:
            raise UserError(
                f"step {step} is not journalled in {self.paths.samples_dir}; there are steps {ranges(self.steps)} (runner.keep_groups)"
            )
        path = self.paths.order(step)
        rows = whole_rows(path, {"groups": TEXTS, "generated": TEXTS})
        trained, generated = (rows[-1]["groups"], rows[-1]["generated"]) if rows else ([], [])
        if not trained or not {*trained} <= {*generated} or not all(name.partition(".")[0].isdecimal() for name in generated):
            raise UserError(f"{path}: does not say which groups the step trains on; the file is damaged, and its step cannot be replayed")
        return trained, generated

    def files(self, group_id: str) -> list[str]:
        """The files that may hold a group: the journal of the step that it was begun for, and those set aside when the run was resumed."""
        journal = self.paths.groups(int(group_id.partition(".")[0]))
        return [str(p) for p in (journal, *replaced(journal)) if p.exists()]

    async def take(self, step: int, reader: WorkerGroup) -> StepBatch:
        """The groups of a step, read by the ranks of `reader` (workers.journal)."""
        trained, generated = self.order(step)

        async def fetch(group_id: str) -> Scored:
            rank = int(group_id.partition(".")[0]) % reader.size  # one rank reads a file
            header, tokens = reader.ref(rank, "fetch", self.files(group_id), group_id, returns=2)
            return await header, tokens

        found = dict(zip(generated, await asyncio.gather(*map(fetch, generated))))
        return StepBatch([found[name] for name in trained], [header for header, _ in found.values()], {})


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))
