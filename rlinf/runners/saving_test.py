"""Checkpoints in the background: one at a time, and none counts before every rank has said so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rlinf.errors import RunFailed
from rlinf.run_folder.folder import RunFolder
from rlinf.run_folder.folder_test import close, open_folder
from rlinf.runners.saving import Saving


class Actor:
    """Stands for the group of actor ranks: writes a file, remembers what it was asked."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[str] = []
        self.fails = fails

    async def call_all(self, method: str, *args: str) -> list[None]:
        self.calls.append(method)
        if method == "save":
            (Path(args[0]) / "weights.safetensors").write_text(args[0])
        elif self.fails:
            raise RunFailed("the checkpoint could not be written: the disk is full")
        return [None]


def state(values: dict[str, int]) -> Callable[[Path], Awaitable[dict[str, int]]]:
    async def describe(_: Path) -> dict[str, int]:
        return values

    return describe


def latest(folder: RunFolder) -> str | None:
    link = folder.paths.latest
    return link.resolve().name if link.exists() else None


def test_in_the_foreground_a_checkpoint_counts_at_once(tmp_path: Path) -> None:
    folder, actor = open_folder(tmp_path), Actor()
    saving = Saving(folder, [actor], background=False)
    asyncio.run(saving.save(3, state({"step": 3})))
    assert latest(folder) == "step_000003" and actor.calls == ["save"] and saving.pending is None


def test_in_the_background_it_counts_when_it_is_completed_with_the_state_of_its_step(tmp_path: Path) -> None:
    folder, actor = open_folder(tmp_path), Actor()
    saving = Saving(folder, [actor], background=True)
    asyncio.run(saving.save(3, state({"step": 3})))
    assert latest(folder) is None and saving.pending
    saving.written = True
    asyncio.run(saving.complete())
    assert latest(folder) == "step_000003" and saving.pending is None and not saving.written
    asyncio.run(saving.complete())
    assert actor.calls == ["save", "finish_save"]
    close(folder)
    assert open_folder(tmp_path, "runner.resume_dir=auto").resume.step == 3


def test_at_most_one_is_on_its_way(tmp_path: Path) -> None:
    folder, actor = open_folder(tmp_path), Actor()
    saving = Saving(folder, [actor], background=True)
    for step in (1, 2):
        asyncio.run(saving.save(step, state({"step": step})))
    assert actor.calls == ["save", "finish_save", "save"] and latest(folder) == "step_000001"


def test_a_failed_write_ends_the_run_and_leaves_the_one_before_in_force(tmp_path: Path) -> None:
    folder, actor = open_folder(tmp_path), Actor()
    saving = Saving(folder, [actor], background=True)
    asyncio.run(saving.save(1, state({"step": 1})))
    asyncio.run(saving.complete())
    actor.fails = True
    asyncio.run(saving.save(2, state({"step": 2})))
    with pytest.raises(RunFailed, match="disk is full"):
        asyncio.run(saving.complete())
    close(folder)
    assert open_folder(tmp_path, "runner.resume_dir=auto").resume.step == 1
