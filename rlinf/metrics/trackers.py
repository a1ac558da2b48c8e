"""Experiment trackers: the scalars of metrics.jsonl are also sent to a service that the user has and names.

Each tracker needs its own package, and its own account or server, set up as its documentation says (WANDB_API_KEY or WANDB_MODE=offline,
SWANLAB_MODE, MLFLOW_TRACKING_URI, ...). A resumed run goes on in the same run of the tracker, whose id is kept in <run_dir>/trackers.json.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlinf.files import as_json, read_json, write_whole


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run. resume_id: the id that the tracker gave it when it began."""

    project: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    resume_id: str | None


class Tracker(Protocol):
    run_id: str

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """https://docs.wandb.ai. Its steps can only grow, so a step that is made again keeps its first values there."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.config),
            id=run.resume_id,
            resume="allow" if run.resume_id else None,
        )
        self.run_id: str = self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Swanlab:
    """https://docs.swanlab.cn"""

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        own = {"id": run.resume_id, "resume": "allow"} if run.resume_id else {}
        self._module = swanlab
        begun = swanlab.init(
            project=run.project, experiment_name=run.name, logdir=str(run.folder / "swanlab"), config=dict(run.config), **own
        )
        self.run_id = str(getattr(begun, "id", "") or "")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


class Mlflow:
    """https://mlflow.org/docs. Uses the server of MLFLOW_TRACKING_URI, or the folder mlruns/ in the working directory."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._module = mlflow
        mlflow.set_experiment(run.project)
        self.run_id = mlflow.start_run(run_id=run.resume_id, run_name=run.name, log_system_metrics=False).info.run_id
        if run.resume_id is None:
            mlflow.log_params({key: str(value)[:500] for key, value in run.config.items()})  # 500: its limit

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._module.end_run()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": Wandb, "swanlab": Swanlab, "mlflow": Mlflow}


def missing_packages(names: Sequence[str]) -> list[str]:
    """Those of the trackers `names` whose package, which has the same name, is not installed."""
    return [name for name in names if name in TRACKERS and importlib.util.find_spec(name) is None]


class Trackers:
    """The trackers of one run, and its ids in them. Numbers that are not finite are left out, because not every service accepts them."""

    def __init__(self, names: Sequence[str], project: str, folder: Path, config: Mapping[str, Any], resumed: bool) -> None:
        file = folder / "trackers.json"
        ids: dict[str, str] = read_json(file) if resumed and file.exists() else {}
        self._open = {n: TRACKERS[n](TrackedRun(project, folder.name, folder, config, ids.get(n) or None)) for n in names if n in TRACKERS}
        if self._open:
            write_whole(file, as_json(ids | {n: tracker.run_id for n, tracker in self._open.items()}))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self._open.values():
            tracker.log(step, finite)

    def close(self) -> None:
        for tracker in self._open.values():
            tracker.close()
