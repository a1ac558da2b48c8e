"""A run folder as the report sees it: curves, a summary of every step's samples, configuration, environment.

Sample files are read one at a time, so that memory does not grow with the run; torn last lines (the run died while it wrote) are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlinf.errors import UserError
from rlinf.metrics.logger import read_metrics
from rlinf.record_files import NUMBER, NUMBERS, OBJECT, PAIRS, TEXT, TEXTS, WHOLE, Kind, damaged, misfit, or_null, whole_rows
from rlinf.report.task_counts import StepCounts, count_samples
from rlinf.run_paths import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, RunPaths
from rlinf.runners.status import read_status

SETTING = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<value>.*)$")
SAMPLE: dict[str, Kind] = {
    "group_id": TEXT, "sample_id": TEXT, "task": TEXT, "prompt": TEXT, "response": TEXT, "solutions": TEXTS, "reward": NUMBER,
    "status": TEXT, "route": TEXT, "extracted": or_null(TEXT), "reason": TEXT, "length": WHOLE, "finish": TEXT, "versions": PAIRS,
    "parts": NUMBERS,
}  # fmt: skip
TRAINED: dict[str, Kind] = {"sample_id": TEXT} | dict.fromkeys(("advantage", "gap_max", "ratio_mean"), or_null(NUMBER))
SHOWN: dict[str, Kind] = {"pieces": TEXTS} | dict.fromkeys(("advantages", "log_ratios", "gaps"), TEXT)  # of the samples told in full
CHANGED = "the file was changed by hand: bring back the run's own"
START: dict[str, Kind] = {"first_step": WHOLE}
OF_A_START: dict[str, Kind] = {"chat_markers": TEXTS, "packages": OBJECT, "settings": OBJECT}  # where they were recorded


@dataclass(frozen=True)
class Setting:
    """A line of config.yaml: dotted key, value as written, who set it."""

    key: str
    value: str
    origin: str


@dataclass(frozen=True)
class SampleFile:
    """The samples of a step, or of its validation, with what training saw of the same samples where it was written."""

    run: RunPaths
    step: int
    validation: bool

    @property
    def path(self) -> Path:
        return self.run.validation(self.step) if self.validation else self.run.samples(self.step)

    @property
    def label(self) -> str:
        return self.path.stem

    def rows(self) -> list[dict[str, Any]]:
        """The lines, each with its number as `line` and, under `trained`, the sample's line of the tokens file."""
        tokens = self.run.tokens(self.step)
        trained = {row["sample_id"]: row for row in read_trained(tokens)} if tokens.exists() and not self.validation else {}
        samples = enumerate(whole_rows(self.path, SAMPLE), 1)
        return [row | {"line": number, "trained": trained.get(row["sample_id"], {})} for number, row in samples]


@dataclass
class RunData:
    """What the rules and the page look at. metrics: the lines of metrics.jsonl, oldest first."""

    path: Path
    metrics: list[dict[str, float]]
    settings: list[Setting] = field(default_factory=list)
    environment: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    files: list[SampleFile] = field(default_factory=list)
    counts: dict[int, StepCounts] = field(default_factory=dict)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric where it has a finite value."""
        points = [(int(m["step"]), m[name]) for m in self.metrics if math.isfinite(m.get(name, math.nan))]
        return [s for s, _ in points], [v for _, v in points]

    @cached_property
    def values(self) -> dict[str, str]:
        """Settings by key, as written in the file."""
        return {s.key: s.value.strip("'\"") for s in self.settings}

    def number(self, key: str, otherwise: float) -> float:
        """Raises UserError when the file was changed, and holds none there."""
        text = self.values.get(key, "null")
        try:
            return otherwise if text == "null" else float(text)
        except ValueError as error:
            raise UserError(f"{self.path / CONFIG_FILE}: {key} is {text}, no number; {CHANGED}") from error


def open_run(path: Path) -> RunData:
    """Everything but the samples' text. Raises UserError when the folder holds no run."""
    if not (path / METRICS_FILE).is_file():
        raise UserError(f"{path}: no {METRICS_FILE} here; give the folder of a run: <runner.output_dir>/<runner.experiment_name>")
    return RunData(
        path=path.resolve(),
        metrics=read_metrics(path),
        settings=read_settings(path / CONFIG_FILE),
        environment=read_starts(path),
        status=read_status(path),
        files=sample_files(RunPaths(path)),
    )


def count_all(run: RunData) -> Iterator[tuple[SampleFile, list[dict[str, Any]]]]:
    """Read the sample files one after another, filling run.counts on the way."""
    markers = run.environment[-1].get("chat_markers", []) if run.environment else []
    for file in run.files:
        rows = file.rows()
        if not file.validation:
            run.counts[file.step] = count_samples(rows, markers)
        yield file, rows


def sample_files(run: RunPaths) -> list[SampleFile]:
    """In the order of steps; the validation is behind its step."""
    found = [(step, validation) for validation in (False, True) for step in run.steps_of("validation" if validation else "step")]
    return [SampleFile(run, step, validation) for step, validation in sorted(found)]


def read_trained(path: Path) -> list[dict[str, Any]]:
    return _rows(path, TRAINED, lambda row: SHOWN if "pieces" in row else {})


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of environment.jsonl, one for each time the run was started; none when there is no such file."""
    path = run_dir / ENVIRONMENT_FILE
    return _rows(path, START, lambda row: {name: kind for name, kind in OF_A_START.items() if name in row}) if path.exists() else []


def _rows(path: Path, fields: Mapping[str, Kind], more: Callable[[dict[str, Any]], Mapping[str, Kind]]) -> list[dict[str, Any]]:
    """more: what a line must hold besides, as it is one."""
    rows = whole_rows(path, fields)
    for number, row in enumerate(rows, 1):
        if wrong := misfit(row, more(row)):
            raise damaged(path, number, wrong)
    return rows


def read_settings(path: Path) -> list[Setting]:
    """The leaves of a config.yaml as RunFolder writes it; none when there is no such file."""
    found: list[Setting] = []
    sections: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); {CHANGED}") from error
    for line in lines:
        text, _, origin = line.rpartition(" # ") if " # " in line else (line, "", "")
        match = SETTING.match(text)
        if match is None:
            continue
        sections = sections[: len(match["indent"]) // 2]
        if value := match["value"].strip():
            found.append(Setting(".".join([*sections, match["key"]]), value, origin))
        else:
            sections.append(match["key"])
    if not found and path.exists():
        raise UserError(f"{path}: holds no settings; {CHANGED}")
    return found
