"""The checkpoints of a run, each complete or absent.

A checkpoint is written to a folder beside its place, synced, marked COMPLETE, renamed, and only then does `latest` point to it. COMPLETE
lists every file with its size, and the xxh3 of the small ones (the indexes; they hold the checksums of the tensors in the large ones).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlinf.errors import UserError
from rlinf.run_paths import COMPLETE, GROUPS_AHEAD, STATE, RunPaths
from rlinf.weights.tensor_folder import read_json, sync, write_json


@dataclass(frozen=True)
class Resume:
    """Where a run goes on: the checkpoint's folder and its run_state.json."""

    step_dir: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


class Checkpoints:
    """The folder checkpoints/ of a run. keep: how many complete ones stay; 0 = all."""

    def __init__(self, paths: RunPaths, keep: int) -> None:
        self.paths, self.keep = paths, keep

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into."""
        partial = self.paths.partial_checkpoint(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, partial: Path, state: dict[str, Any]) -> Path:
        """Make what was written the latest checkpoint; an interruption at any instant leaves it or the one before it in force.

        state: what goes into run_state.json, with the `step`.
        """
        write_json(partial / STATE, state)
        for folder in [p for p in partial.rglob("*") if p.is_dir()]:
            sync(folder)
        write_json(partial / COMPLETE, inventory(partial))
        sync(partial)
        final = self.paths.checkpoint(state["step"])
        partial.rename(final)
        self.point_latest_to(final)
        return final

    def newest(self) -> Path | None:
        """Where `auto` goes on.

        `latest` may be one behind, as a run can die between the two; or lead to another run, of which this is a branch.
        """
        complete, latest = self.paths.complete_checkpoints(), self.paths.latest
        if not complete and latest.is_symlink() and not latest.exists():
            raise UserError(
                f"runner.resume_dir: this run goes on from {os.readlink(latest)}, which is gone; restore it, or name another step_* folder"
            )
        return self.paths.checkpoint(complete[-1]) if complete else latest if latest.exists() else None

    def point_latest_to(self, step_dir: Path) -> None:
        """Also to a checkpoint of another run, until there is one of this run."""
        checkpoints, latest = self.paths.checkpoints, self.paths.latest
        checkpoints.mkdir(exist_ok=True)
        link = latest.with_name(f"{latest.name}.new")
        link.unlink(missing_ok=True)
        link.symlink_to(step_dir.name if step_dir.parent == checkpoints else step_dir)
        link.replace(latest)
        sync(checkpoints)

    def retire(self, begun_after: int, newest: int) -> None:
        """Remove checkpoints beyond `keep`, and those that were set aside and are now made again: of the steps behind begun_after, from
        which the run went on, up to the newest."""
        for old in self.paths.complete_checkpoints()[: -self.keep] if self.keep else []:
            remove(self.paths.checkpoint(old))
        for step, replaced in self.paths.replaced_checkpoints():
            if begun_after < step <= newest:
                remove(replaced)


def read_checkpoint(step_dir: Path) -> Resume:
    """Open a step_* folder. Raises UserError when it is none, is incomplete, or has lost or changed a file."""
    if not (step_dir / STATE).is_file():
        raise UserError(f"{step_dir} is not a checkpoint (no {STATE}); give a checkpoints/step_* folder of a run")
    if not (step_dir / COMPLETE).exists():
        raise UserError(f"{step_dir} is incomplete (no {COMPLETE} marker): its writing was interrupted; use an earlier one")
    for name, written in read_json(step_dir / COMPLETE).items():
        if name.startswith("hf/") and not (step_dir / "hf").exists():
            continue  # it can be made again (rlinf export), and nothing goes on from it
        file = step_dir / name
        found = {kind: value for kind, value in describe(file).items() if kind in written} if file.is_file() else None
        if found != written:
            what = "is missing" if found is None else f"is damaged: {found} instead of {written}"
            raise UserError(f"{file} {what}; restore it, or use an earlier checkpoint")
    return Resume(step_dir, read_json(step_dir / STATE))


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below the folder, by its relative path."""
    return {str(p.relative_to(folder)): describe(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def describe(file: Path) -> dict[str, Any]:
    """Bytes, and the xxh3 of a file whose tensors have no checksums of their own, as those of weights and moments have."""
    size: dict[str, Any] = {"bytes": file.stat().st_size}
    return (
        size
        if file.suffix == ".safetensors" and file.parent.name != GROUPS_AHEAD
        else size | {"xxh3": xxhash.xxh3_64_hexdigest(file.read_bytes())}
    )


def remove(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).unlink(missing_ok=True)  # first: half a folder must not look complete
    shutil.rmtree(checkpoint)
