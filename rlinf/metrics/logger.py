"""Writes metrics.jsonl and TensorBoard: the same scalars over the same x axis, the step; both are flushed at every step."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rlinf.files import sync, write_through, write_whole
from rlinf.metrics.trackers import TRACKERS, Trackers
from rlinf.record_files import NUMBER, WHOLE, damaged, misfit, or_null, whole_lines, whole_rows
from rlinf.run_paths import METRICS_FILE, aside

BACKENDS = ("tensorboard", *TRACKERS)


class MetricLogger:
    """Writes one line a step to <run_dir>/metrics.jsonl, and the same numbers to the backends.

    resume_step: None = start a new file (which must not exist yet); k = go on after step k; -1 = go on from the start. Lines of later steps
    are moved to metrics.jsonl.replaced-N, and TensorBoard is told to forget those steps.
    last_step: the step of the last line in the file, -1 when there is none. project, config (by key): for trackers (metrics.trackers).
    A number that is not finite is null in the file.
    """

    def __init__(
        self, run_dir: Path, backends: Sequence[str], resume_step: int | None = None, project: str = "rlinf",
        config: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        unknown = sorted(set(backends) - set(BACKENDS))
        if unknown:
            raise ValueError(f"unknown logger backends {unknown}; there is {list(BACKENDS)}")
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        self.last_step = -1
        if resume_step is not None:
            self.last_step = cut_after(path, resume_step)
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_EXCL if resume_step is None else 0), 0o644)
        self.tensorboard = EventFileWriter(str(run_dir / "tensorboard")) if "tensorboard" in backends else None
        if self.tensorboard is not None and resume_step is not None:
            restart = Event(wall_time=time.time(), step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
            self.tensorboard.add_event(restart)

        self.trackers = Trackers(backends, project, run_dir, config or {}, resumed=resume_step is not None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write all scalars of one step. Raises ValueError when the step does not come after the last one."""
        if step <= self.last_step:
            raise ValueError(f"metrics of step {step} come after those of step {self.last_step}")
        self.last_step = step
        now = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step, "time": now} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        text = (json.dumps(line, allow_nan=False) + "\n").encode()
        if os.write(self.file, text) < len(text):  # one write: a line is whole, or torn because nothing more fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), METRICS_FILE)
        if self.tensorboard is not None:
            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self.tensorboard.add_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))
            self.tensorboard.flush()
        self.trackers.log(step, values)

    def close(self) -> None:
        os.fsync(self.file)
        os.close(self.file)
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.trackers.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, with null as NaN, without a torn last line (the machine died while it was written).

    Raises UserError that names the first line which has no step, whose step does not come after the one before, or which has a value that
    is not a number.
    """
    return _metrics(run_dir / METRICS_FILE)


def _metrics(path: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for number, row in enumerate(whole_rows(path, {"step": WHOLE}), 1):
        wrong = misfit(row, dict.fromkeys(row, or_null(NUMBER)))
        if wrong is None and found and row["step"] <= found[-1]["step"]:
            wrong = f"step {row['step']} comes after step {found[-1]['step']}"
        if wrong:
            raise damaged(path, number, wrong)
        found.append({name: math.nan if v is None else v if name == "step" else float(v) for name, v in row.items()})
    return found


def cut_after(path: Path, step: int) -> int:
    """Move the lines after `step` to <path>.replaced-N, so that the run can write those steps again. Returns the step of the last line that
    stays.

    An interruption at any instant loses nothing.
    """
    if not path.exists():
        return -1
    lines, torn = whole_lines(path)
    steps = [int(row["step"]) for row in _metrics(path)]
    kept = [line for line, of in zip(lines, steps) if of <= step]
    replaced = [line for line, of in zip(lines, steps) if of > step] + ([torn] if torn else [])
    last = steps[len(kept) - 1] if kept else -1
    if not replaced:
        return last
    write_through(aside(path), replaced)
    sync(path.parent)
    write_whole(path, kept)
    return last
