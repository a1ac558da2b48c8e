"""A run on disk: who owns the folder, where things are, and checkpoints that are complete or absent.

A checkpoint is written to a folder beside its place, synced, marked COMPLETE, renamed, and only then does `latest` point to it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf.config.load import Resolved, to_yaml
from rlinf.errors import UserError
from rlinf.metrics.logger import FILE_NAME
from rlinf.weights.tensor_folder import sync, write_json

STATE = "run_state.json"
COMPLETE = "COMPLETE"
FINISHED = "FINISHED"


@dataclass(frozen=True)
class Resume:
    """Where a run goes on: the checkpoint's folder and its run_state.json."""

    step_dir: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


class RunFolder:
    """<runner.output_dir>/<runner.experiment_name>, held by one driver at a time. command: the one that runs here, `train` or `sft`."""

    def __init__(self, resolved: Resolved, command: str = "train") -> None:
        runner, self.command = resolved.config.runner, command
        self.path = Path(runner.output_dir).expanduser().resolve() / runner.experiment_name
        self.keep = runner.keep_checkpoints
        _make(self.path)
        self._lock = open(self.path / ".lock", "w")
        self._hold()
        self.continues = self._has_steps()
        self.resume = self._find_resume(runner.resume_dir)
        if self.continues:
            self._set_aside_samples(self.resume.step if self.resume else 0)
        (self.path / "config.yaml").write_text(to_yaml(resolved))
        (self.path / FINISHED).unlink(missing_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step_{step:06d}.jsonl"

    def tokens(self, step: int) -> Path:
        return self.path / "samples" / f"tokens_{step:06d}.jsonl"

    def validation(self, step: int) -> Path:
        return self.path / "samples" / f"validation_{step:06d}.jsonl"

    def begin_checkpoint(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into."""
        partial = self.checkpoints / f"step_{step:06d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def finish_checkpoint(self, partial: Path, state: dict[str, Any]) -> Path:
        """Make what was written the latest checkpoint; an interruption at any instant leaves the old latest one in force."""
        write_json(partial / STATE, {"command": self.command} | state)
        for folder in [p for p in partial.rglob("*") if p.is_dir()]:
            sync(folder)
        (partial / COMPLETE).touch()
        sync(partial)
        final = partial.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)  # an earlier life's checkpoint of the same step, which this run has just repeated
        partial.rename(final)
        link = self.checkpoints / "latest.new"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(self.checkpoints / "latest")
        sync(self.checkpoints)
        self._retire()
        return final

    def finish(self) -> None:
        (self.path / FINISHED).touch()

    def _has_steps(self) -> bool:
        """A start that failed before its first line of metrics left nothing worth keeping: the run may start again in its folder."""
        metrics = self.path / FILE_NAME
        if metrics.exists() and metrics.stat().st_size == 0:
            metrics.unlink()
        return metrics.exists()

    def _set_aside_samples(self, step: int) -> None:
        """Samples of steps that are about to be repeated keep their text under another name."""
        for file in sorted((self.path / "samples").glob("*_??????.jsonl")):
            if int(file.stem[-6:]) > step or (self.resume is None and file.stem.startswith("validation")):
                number = len(list(file.parent.glob(f"{file.name}.replaced-*"))) + 1
                file.rename(file.with_name(f"{file.name}.replaced-{number}"))

    def _retire(self) -> None:
        done = sorted(p for p in self.checkpoints.glob("step_*") if (p / COMPLETE).exists())
        for old in done[: -self.keep] if self.keep else []:
            (old / COMPLETE).unlink()  # first: half a folder must not look complete
            shutil.rmtree(old)

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another run is writing here now; set runner.experiment_name to another name") from error

    def _find_resume(self, resume_dir: str | None) -> Resume | None:
        others = [p.name for p in self.path.iterdir() if p.name != ".lock"]
        if others and not (self.path / "config.yaml").exists():
            raise UserError(f"{self.path}: the folder holds {sorted(others)[0]} but no run of rlinf; set runner.experiment_name or runner.output_dir elsewhere")
        if self.continues and resume_dir is None:
            how = "has finished" if (self.path / FINISHED).exists() else "stopped before its end"
            raise UserError(
                f"{self.path}: there is a run here already, and it {how}; nothing was overwritten. "
                "To go on with it: runner.resume_dir=auto. For a new run: runner.experiment_name=ANOTHER_NAME, or move the folder away"
            )
        step_dir = self.checkpoints / "latest" if resume_dir == "auto" else Path(resume_dir or "").expanduser()
        if resume_dir is None or (resume_dir == "auto" and not step_dir.exists()):
            return None
        resume = read_checkpoint(step_dir.resolve())
        if resume.state["command"] != self.command:
            raise UserError(
                f"runner.resume_dir: {resume.step_dir} is a checkpoint of `rlinf {resume.state['command']}`, and this is `rlinf {self.command}`; "
                f"to start from its weights set rollout.model_dir={resume.step_dir / 'hf'}, in a new run"
            )
        return resume


def read_checkpoint(step_dir: Path) -> Resume:
    """Open a step_* folder. Raises UserError when it is none or is incomplete."""
    if not (step_dir / STATE).is_file():
        raise UserError(f"runner.resume_dir: {step_dir} is not a checkpoint (no {STATE}); give a checkpoints/step_* folder, or `auto`")
    if not (step_dir / COMPLETE).exists():
        raise UserError(f"runner.resume_dir: {step_dir} is incomplete (no {COMPLETE} marker): its writing was interrupted; use an earlier one")
    return Resume(step_dir, json.loads((step_dir / STATE).read_text()))


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"runner.output_dir: cannot create {path}: {error.strerror}; choose a folder that you may write to") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"runner.output_dir: {path} is not writable; choose a folder that you may write to")
