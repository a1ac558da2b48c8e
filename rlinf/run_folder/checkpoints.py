"""The checkpoints of a run, each either complete or absent.

A checkpoint is written to a folder with another name, synced, marked COMPLETE, renamed, and only then does `latest` point to it. COMPLETE
lists every file with its size, and the xxh3 of the small ones (the indexes, which hold the checksums of the tensors in the large ones).
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from rlinf.errors import UserError
from rlinf.files import read_json, sync, write_json
from rlinf.run_paths import COMPLETE, GROUPS_AHEAD, STATE, RunPaths

ACCURACY, LOSS = "eval/accuracy", "sft/val_loss"  # of held-out data


class Score(NamedTuple):
    """Of a checkpoint on held-out data, larger is better. measured_on: stands for the data and for how it was sampled and judged."""

    value: float
    measured_on: str


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run is resumed from: its folder and its run_state.json."""

    step_dir: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


class Checkpoints:
    """The folder checkpoints/ of a run. keep: how many complete ones stay; 0 = all. keep_best: whether the best one stays, too."""

    def __init__(self, paths: RunPaths, keep: int, keep_best: bool) -> None:
        self.paths, self.keep, self.keep_best = paths, keep, keep_best
        self._scores: dict[int, Score | None] = {}

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into."""
        partial = self.paths.partial_checkpoint(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish(self, partial: Path, state: dict[str, Any]) -> Path:
        """Make what was written the latest checkpoint. When that is interrupted, either it or the one before it is the latest.

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
        self._scores[state["step"]] = held_out_score(state)
        self.point_best()
        return final

    def newest(self) -> Path | None:
        """The checkpoint that runner.resume_dir=auto means, or None.

        Not simply `latest`, which may be one checkpoint behind when a run died before it moved the link. Where the run has no checkpoint of
        its own yet, `latest` leads to the one of another run from which this run was branched.
        """
        complete, latest = self.paths.complete_checkpoints(), self.paths.latest
        if not complete and latest.is_symlink() and not latest.exists():
            raise UserError(
                f"runner.resume_dir: this run goes on from {os.readlink(latest)}, which is gone; restore it, or name another step_* folder"
            )
        return self.paths.checkpoint(complete[-1]) if complete else latest if latest.exists() else None

    def point_latest_to(self, step_dir: Path) -> None:
        """step_dir: a checkpoint of this run, or before there is one, that of another run from which this one was branched."""
        self.paths.checkpoints.mkdir(exist_ok=True)
        self._point(self.paths.latest, step_dir)

    def point_best(self) -> None:
        """Let `best` lead to the best checkpoint; without one there is no such link."""
        if (best := self.best()) is not None:
            self._point(self.paths.best, self.paths.checkpoint(best))
        else:
            self.paths.best.unlink(missing_ok=True)

    def best(self) -> int | None:
        """The step of the complete checkpoint with the best held-out score, the newest of equals; None where none has a score, or the best
        is not kept. Only scores on what the newest of them was measured on are compared."""
        steps = self.paths.complete_checkpoints() if self.keep_best else []
        for step in steps:
            if step not in self._scores:
                self._scores[step] = score_of(self.paths.checkpoint(step))
        scored = {step: score for step in steps if (score := self._scores[step]) is not None}
        if not scored:
            return None
        measured_on = scored[max(scored)].measured_on
        return max((score.value, step) for step, score in scored.items() if score.measured_on == measured_on)[1]

    def retire(self, begun_after: int, newest: int) -> None:
        """Remove checkpoints beyond `keep` but the best, and those set aside for steps that have now been made again: from the step after
        begun_after, the one that the run was resumed from, up to `newest`."""
        for old in {*self.paths.complete_checkpoints()[: -self.keep]} - {self.best()} if self.keep else ():
            remove(self.paths.checkpoint(old))
        for step, replaced in self.paths.replaced_checkpoints():
            if begun_after < step <= newest:
                remove(replaced)

    def _point(self, link: Path, step_dir: Path) -> None:
        new = link.with_name(f"{link.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(step_dir.name if step_dir.parent == self.paths.checkpoints else step_dir)
        new.replace(link)
        sync(self.paths.checkpoints)


def score_of(checkpoint: Path) -> Score | None:
    """The held-out score of a complete checkpoint; None also where its state cannot be read, which is for those who resume from it."""
    try:
        return held_out_score(read_json(checkpoint / STATE))
    except UserError:
        return None


def held_out_score(state: dict[str, Any]) -> Score | None:
    """None where the step was not validated."""
    metrics = state.get("metrics", {})
    loss = metrics.get(LOSS)
    score = metrics.get(ACCURACY, None if loss is None else -loss)
    return Score(score, state.get("measured_on", "")) if score is not None and math.isfinite(score) else None


def read_checkpoint(step_dir: Path) -> Resume:
    """Open a step_* folder. Raises UserError when it is not a checkpoint, is incomplete, or a file in it is missing or has changed."""
    if not (step_dir / STATE).is_file():
        raise UserError(f"{step_dir} is not a checkpoint (no {STATE}); give a checkpoints/step_* folder of a run")
    if not (step_dir / COMPLETE).exists():
        raise UserError(f"{step_dir} is incomplete (no {COMPLETE} marker): its writing was interrupted; use an earlier one")
    for name, written in read_json(step_dir / COMPLETE).items():
        if name.startswith("hf/") and not (step_dir / "hf").exists():
            continue  # no run is resumed from it, and `rlinf export` can make it again
        file = step_dir / name
        found = {kind: value for kind, value in describe(file).items() if kind in written} if file.is_file() else None
        if found != written:
            what = "is missing" if found is None else f"is damaged: {found} instead of {written}"
            raise UserError(f"{file} {what}; restore it, or use an earlier checkpoint")
    return Resume(step_dir, read_json(step_dir / STATE))


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """What describe() says of every file below the folder, by relative path."""
    return {str(p.relative_to(folder)): describe(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def describe(file: Path) -> dict[str, Any]:
    """The size of a file and its xxh3; only the size of files of weights and moments, whose tensors have checksums of their own."""
    size: dict[str, Any] = {"bytes": file.stat().st_size}
    if file.suffix == ".safetensors" and file.parent.name != GROUPS_AHEAD:
        return size
    return size | {"xxh3": xxhash.xxh3_64_hexdigest(file.read_bytes())}


def remove(checkpoint: Path) -> None:
    (checkpoint / COMPLETE).unlink(missing_ok=True)  # first: half a folder must not look complete
    shutil.rmtree(checkpoint)
