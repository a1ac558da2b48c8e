"""Around the steps: how many there are, also in a run that goes on under other settings."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlinf.config.load import load
from rlinf.data.sampler import PromptSampler
from rlinf.run_folder.folder import RunFolder
from rlinf.runners.training_loop import StepResult, TrainingLoop

EXAMPLES = 100


class Seen(TrainingLoop):
    """Learns nothing; notes what it was given."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[list[int]] = []

    async def ready(self) -> None: ...

    async def begin(self) -> None: ...

    async def take_step(self) -> StepResult:
        self.batches.append(self.sampler.next_batch())
        return StepResult({}, tokens=0)

    async def validate(self) -> dict[str, float]:
        return {}

    async def state(self, folder: Path) -> dict[str, Any]:
        return {}

    async def restore(self, folder: Path, state: dict[str, Any]) -> None: ...


def life(folder: Path, batch_size: int, max_steps: int = -1) -> Seen:
    """A run of one epoch or of max_steps, in `folder`, or how it goes on."""
    words = ["runner.resume_dir=auto", "runner.save_interval=-1", "runner.val_check_interval=0", f"runner.max_steps={max_steps}"]
    place = [f"runner.output_dir={folder}", "runner.max_epochs=1"]
    resolved = load("smollm2-135m-grpo-cpu", words + place)
    run = RunFolder(resolved, "sft")
    run.begin()
    loop = Seen(
        resolved.config,
        run,
        SimpleNamespace(phase=""),
        PromptSampler(EXAMPLES, batch_size, resolved.config.data.shuffle, resolved.config.data.seed),
        [],
    )
    asyncio.run(loop.run(SimpleNamespace(log=lambda *_: None, last_step=EXAMPLES)))
    run.release()
    return loop


@pytest.mark.parametrize(("first", "at", "second", "more"), [(8, 6, 4, 13), (4, 15, 8, 5), (4, 15, 4, 10)])
def test_a_run_that_goes_on_with_another_batch_size_sees_what_is_left_of_its_epochs(
    tmp_path: Path, first: int, at: int, second: int, more: int
) -> None:
    before, between = life(tmp_path, first, at), life(tmp_path, second, at + 1)
    after = life(tmp_path, second)
    assert (before.step, between.step) == (at, at + 1) and after.step == after.total_steps == at + more
    seen = [i for loop in (before, between, after) for batch in loop.batches for i in batch]
    assert sorted(seen) == list(range(EXAMPLES))
