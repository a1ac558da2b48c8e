"""A run's folder: the lock of the driver that owns it, and resuming in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TextIO

from rlinf.config.load import Resolved, to_yaml
from rlinf.data.lines import append_lines
from rlinf.data.sampler import PromptSampler
from rlinf.errors import UserError
from rlinf.files import scratch_of, write_whole
from rlinf.run_folder.checkpoints import Checkpoints, Resume, read_checkpoint
from rlinf.run_folder.resuming import TRAIN, groups_ahead, made_with, refuse_changes, regenerated_groups
from rlinf.run_paths import CONFIG_FILE, FINISHED, METRICS_FILE, SAMPLE_KINDS, RunPaths, aside
from rlinf.weights.files import WEIGHTS_FOLDER, remove_published


class RunFolder:
    """<runner.output_dir>/<runner.experiment_name>, locked by one driver at a time. command: the one that runs here, as the user types it.
    measured_on: stands for the held-out data, how they are sampled and judged; scores are only compared with those on the same.

    Opening it changes nothing in it, so that a run which cannot be resumed is refused with everything in its place; begin() changes it.
    """

    measured_on = ""

    def __init__(self, resolved: Resolved, command: str = TRAIN) -> None:
        runner, self.command, self.config = resolved.config.runner, command, resolved.config
        self.path, self.paths = runner.run_dir, RunPaths(runner.run_dir)
        self.checkpoints = Checkpoints(self.paths, runner.keep_checkpoints, runner.keep_best)
        self.keep_groups, self.ahead = runner.keep_groups, resolved.config.algorithm.max_staleness
        self._begun_for: dict[int, Set[int]] = {}  # step -> the steps that its groups were begun for, as its order file says
        self._settings = {"made_with": made_with(self.config)} if command == TRAIN else {}  # files of own functions may change meanwhile
        _make(self.path)
        self._lock = open(self.path / ".lock", "w")
        self._hold()
        self.continues = self._has_steps()
        self.resume = self._find_resume(runner.resume_dir)
        self._resolved = resolved

    def begin(self) -> None:
        """Make the folder this run's: set aside what comes after the step from which it is resumed, and write config.yaml."""
        self._set_aside(self.resume.step if self.resume else -1)
        remove_published(self.path / WEIGHTS_FOLDER)
        write_whole(self.path / CONFIG_FILE, to_yaml(self._resolved))
        (self.path / FINISHED).unlink(missing_ok=True)

    def measures_as(self, state: Mapping[str, Any]) -> bool:
        """Whether the scores in a checkpoint's state were measured on this run's held-out data; taken to be so where it does not say."""
        return state.get("measured_on", self.measured_on) == self.measured_on

    def nothing_left(self, sampler: PromptSampler) -> bool:
        """Whether the run has already made all steps that its configuration asks for. Sets the sampler to the state in the checkpoint.

        Raises UserError when the checkpoint was made with other prompts.
        """
        if self.resume is None:
            return False
        state, runner = self.resume.state, self.config.runner
        sampler.load_state_dict(state["sampler"])
        total = sampler.total_steps(runner.max_epochs, runner.max_steps, self.resume.step, groups_ahead(state))
        own = self.resume.step_dir.parent == self.paths.checkpoints
        return own and (self.path / FINISHED).exists() and total <= self.resume.step

    @property
    def resume_step(self) -> int | None:
        """The last step whose metrics are kept: None in a new folder, -1 when a run that had made steps starts from its beginning."""
        return None if not self.continues else self.resume.step if self.resume else -1

    def finish_checkpoint(self, partial: Path, state: dict[str, Any]) -> Path:
        """Make what was written the latest checkpoint. When that is interrupted, either it or the one before it is the latest."""
        final = self.checkpoints.finish(partial, {"command": self.command, "measured_on": self.measured_on} | self._settings | state)
        self.checkpoints.retire(self.resume.step if self.resume else -1, state["step"])
        return final

    def record_order(self, step: int, trained: Sequence[str], generated: Sequence[str]) -> None:
        """Write down which groups the step trains on, in order, and which were generated for it: with their journal (samples/groups_*) the
        step can be replayed. Removes what is beyond runner.keep_groups, but not of the step after a checkpoint: the order of a step, and
        the journals in which no kept step has a group."""
        if self.keep_groups == 0:
            return
        append_lines(self.paths.order(step), [json.dumps({"groups": list(trained), "generated": list(generated)})])
        if self.keep_groups < 0:
            return
        pinned = {1, *(saved + 1 for saved in self.paths.complete_checkpoints())}
        for trained_on in self.paths.steps_of("order"):
            if trained_on <= step - self.keep_groups and trained_on not in pinned:
                self.paths.order(trained_on).unlink()
        self._begun_for = {of: self._begun_for.get(of) or _begun_for(self.paths.order(of)) for of in self.paths.steps_of("order")}
        needed = set[int]().union(*self._begun_for.values())
        for begun_for in self.paths.steps_of("groups"):  # that step, one of the next `ahead` or, where the clock decides, an earlier one
            if begun_for + self.ahead <= step and begun_for not in needed:  # trains on them
                self.paths.groups(begun_for).unlink()

    def release(self) -> None:
        """Unlock the folder for another driver; called when the workers are gone."""
        remove_published(self.path / WEIGHTS_FOLDER)
        self._lock.close()

    def finish(self) -> None:
        (self.path / FINISHED).touch()

    def _has_steps(self) -> bool:
        """Whether a run has made steps here. A start that failed before its first line of metrics has left nothing worth keeping."""
        metrics = self.path / METRICS_FILE
        if metrics.exists() and metrics.stat().st_size == 0:
            metrics.unlink()
        return metrics.exists() or bool(self.paths.complete_checkpoints())

    def _set_aside(self, step: int) -> None:
        """Rename samples and checkpoints of the steps after `step`, which are about to be made again.

        Newest first, so that an interruption leaves a run that can be resumed, if from an earlier step than before.
        """
        if self.resume is not None:
            self.checkpoints.point_latest_to(self.resume.step_dir)
        own = self.resume is not None and self.resume.step_dir.parent == self.paths.checkpoints
        for _, unfinished in self.paths.unfinished_checkpoints():
            shutil.rmtree(unfinished)
        for later in reversed(self.paths.complete_checkpoints()):
            if not own or later > step:
                _put_aside(self.paths.checkpoint(later))
        self.checkpoints.point_best()
        files = [(of, kind) for kind in SAMPLE_KINDS for of in self.paths.steps_of(kind) if of > step]
        for of, kind in sorted(files, reverse=True):
            _put_aside(self.paths.sample_file(kind, of))
        if self.resume is not None and self.command == TRAIN:
            for at, groups in regenerated_groups(self.resume.state).items():
                for file in (self.paths.samples(at), self.paths.groups(at)):
                    _take_out(file, groups)

    def _hold(self) -> None:
        busy = f"{self.path}: another run is writing here now; set runner.experiment_name to another name"
        lock_alone(self._lock, self.path, "runner.output_dir", busy)

    def _find_resume(self, resume_dir: str | None) -> Resume | None:
        begun = {".lock", scratch_of(self.path / CONFIG_FILE).name}  # what a run that was killed as it began has left
        others = [p.name for p in self.path.iterdir() if p.name not in begun]
        if others and not (self.path / CONFIG_FILE).exists():
            raise UserError(
                f"{self.path}: the folder holds {sorted(others)[0]} but no run of rlinf; "
                "set runner.experiment_name or runner.output_dir elsewhere"
            )
        if self.continues and resume_dir is None:
            how = "has finished" if (self.path / FINISHED).exists() else "stopped before its end"
            raise UserError(
                f"{self.path}: there is a run here already, and it {how}; nothing was overwritten. "
                "To go on with it: runner.resume_dir=auto. For a new run: runner.experiment_name=ANOTHER_NAME, or move the folder away"
            )
        step_dir = self.checkpoints.newest() if resume_dir == "auto" else Path(resume_dir).expanduser() if resume_dir else None
        if step_dir is None:
            return None
        resume = read_checkpoint(step_dir.resolve())
        refuse_changes(resume.step_dir, resume.state, self.command, self.config)
        return resume


def lock_alone(lock: TextIO, folder: Path, key: str, busy: str) -> None:
    """Lock the open file for as long as it is open. Raises UserError: with the text `busy` when another process holds the lock, and another
    one where the file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(busy) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise UserError(
            f"{folder}: files on this file system cannot be locked ({error.strerror}), so two runs could write there at once; mount it "
            f"with -o flock (Lustre) or with its lock service (NFS), or choose another {key}"
        ) from error


def _put_aside(path: Path) -> None:
    path.rename(aside(path))


def _take_out(path: Path, groups: Set[str]) -> None:
    """Move the lines of these groups to the first free name of the form <name>.replaced-N; the other lines stay.

    A torn line is moved too: whatever was written before the checkpoint is whole.
    """
    if not path.exists():
        return
    go, rest = [], path.with_name(f"{path.name}.partial")
    with path.open("rb") as file, rest.open("wb") as stay:
        for line in file:
            if _group_of(line) in {*groups, None}:
                go.append(line)
            else:
                stay.write(line)
    if go:
        aside(path).write_bytes(b"".join(go))
        rest.replace(path)
    else:
        rest.unlink()


def _group_of(line: bytes) -> str | None:
    """The group id in a line of samples or of a journal; None where the line is torn, or glued to a torn one."""
    try:
        return json.loads(line)["group_id"]
    except ValueError:
        return None


def _begun_for(order: Path) -> Set[int]:
    """The steps whose journals hold groups of this step. A damaged line names none: its step cannot be replayed."""
    found = set[int]()
    for line in order.read_bytes().splitlines():
        try:
            found |= {int(name.partition(".")[0]) for name in json.loads(line)["generated"]}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"runner.output_dir: cannot create {path}: {error.strerror}; choose a folder that you may write to") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"runner.output_dir: {path} is not writable; choose a folder that you may write to")
