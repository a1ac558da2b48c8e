"""status.json: what a run is doing now, for `rlinf watch`. A small file, replaced as a whole once a second."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.errors import UserError
from rlinf.files import write_visible
from rlinf.record_files import NUMBER, TEXT, Kind, misfit, or_null
from rlinf.rollout.contract import EngineStats
from rlinf.run_paths import STATUS_FILE
from rlinf.runners.training_loop import TrainingLoop


def _ranks(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(r, dict) and TEXT.holds(r.get("where")) and isinstance(r.get("running"), dict) for r in value
    )


def _engine(value: Any) -> bool:
    return isinstance(value, dict) and misfit(value, {"samples": NUMBER, "tokens_per_second": or_null(NUMBER)}) is None


FIELDS = {
    **dict.fromkeys(("state", "error", "host", "phase"), TEXT),
    **dict.fromkeys(("time", "pid", "step", "total_steps", "step_since", "phase_since"), NUMBER),
    "seconds_per_step": or_null(NUMBER),
    "components": Kind("an object with the ranks of each component", lambda v: isinstance(v, dict) and all(map(_ranks, v.values()))),
    "engines": Kind("a list of engines", lambda v: isinstance(v, list) and all(map(_engine, v))),
}


def read_status(run_dir: Path) -> dict[str, Any]:
    """The content of the file, or {} when there is none. Raises UserError when it is damaged."""
    path = run_dir / STATUS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError):
        found = None
    wrong = misfit(found, FIELDS) if isinstance(found, dict) else "not a JSON object"
    if wrong:
        raise UserError(f"{path} is damaged ({wrong}); remove it: a run writes it anew once a second, and nothing else is lost with it")
    return found


class Status:
    """Writes the status file of one run. The monitor calls it from a thread, so that the file stays fresh when the loop is stuck."""

    def __init__(self, run_dir: Path, run_id: str, cluster: Cluster, groups: Sequence[WorkerGroup], loop: TrainingLoop) -> None:
        self.path, self.run_id, self.cluster, self.groups, self.loop = run_dir / STATUS_FILE, run_id, cluster, groups, loop
        self.started = time.time()
        self.phase, self.phase_since = cluster.phase, self.started
        self.first_step: int | None = None
        self.step_since = self.steps_since = self.started
        self.last_step = 0
        self.error = ""

    def end(self, error: BaseException | None) -> None:
        """Write the last status, which says how the run ended. error: the exception that ended it, if there was one."""
        self.error = "" if error is None else str(error)
        self.write("finished" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")

    def write(self, state: str = "running") -> None:
        """Replace the file. Does not raise when that fails, so that a full disk does not hide the error that ended the run."""
        try:
            write_visible(self.path, json.dumps(self.snapshot(state)))
        except OSError as error:
            sys.stderr.write(f"rlinf: {self.path} could not be written: {error}\n")

    def snapshot(self, state: str) -> dict[str, Any]:
        """What the file is to say now."""
        now, step = time.time(), self.loop.step
        if self.cluster.phase != self.phase:
            self.phase, self.phase_since = self.cluster.phase, now
        if step != self.last_step and self.phase.step is not None:
            self.first_step = step if self.first_step is None else self.first_step
            self.steps_since = now if step == self.first_step else self.steps_since
            self.last_step, self.step_since = step, now
        return {
            "run_id": self.run_id,
            "state": state,
            "error": self.error,
            "time": now,
            "started": self.started,
            "host": platform.node(),
            "pid": os.getpid(),
            "step": step,
            "total_steps": self.loop.total_steps,
            "step_since": self.step_since,
            "seconds_per_step": self.seconds_per_step(),
            "phase": str(self.phase),
            "phase_since": self.phase_since,
            "components": {
                g.component: [rank_state(g, rank, self.loop.last.memory.get(g.component)) for rank in range(g.size)] for g in self.groups
            },
            "engines": self.engines(),
        }

    def seconds_per_step(self) -> float | None:
        """Mean over the steps that this process has finished; None before the first."""
        finished = 0 if self.first_step is None else self.last_step - self.first_step
        return (self.step_since - self.steps_since) / finished if finished else None

    def engines(self) -> list[dict[str, float | None]]:
        """Samples at each engine now, and its tokens per busy second in the last finished step."""
        stats = list(self.loop.last.engine_stats) or [EngineStats()] * len(self.loop.engine_load)
        speeds = [s.decoded_tokens / s.busy_seconds if s.busy_seconds else None for s in stats]
        return [{"samples": n, "tokens_per_second": speed} for n, speed in zip(self.loop.engine_load, speeds)]


def rank_state(group: WorkerGroup, rank: int, memory: Sequence[int] | None) -> dict[str, Any]:
    running = {method: n for method, n in dict(group.in_flight[rank]).items() if n}
    return {"where": group.where(rank), "running": running, "memory_gib": memory and round(memory[rank] / 2**30, 2)}
