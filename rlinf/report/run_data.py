"""Reads a run folder for the report and the comparison: curves, samples, a summary of every step's samples, configuration, environment.

Sample files are read one at a time, so that memory does not grow with the run. Torn last lines (the run died while it wrote) are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlinf.config.keys import known_keys
from rlinf.config.settings import parse, python_value
from rlinf.config.values import dump
from rlinf.errors import UserError
from rlinf.launch.status import read_status
from rlinf.metrics.logger import read_metrics
from rlinf.record_files import NUMBER, NUMBERS, OBJECT, PAIRS, TEXT, TEXTS, WHOLE, Kind, damaged, misfit, or_null, whole_rows
from rlinf.report.task_counts import StepCounts, count_samples
from rlinf.run_paths import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, RunPaths
from rlinf.weights.checksum import weights_checksum

Sample = dict[str, Any]  # a line of a file of samples
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
class SampleFile:
    """The samples of a step or of its validation, with what training computed for the same samples where that was written."""

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
        """The lines, each with its number as `line`, and as `trained` the line of the tokens file about the same sample."""
        tokens = self.run.tokens(self.step)
        trained = {row["sample_id"]: row for row in read_trained(tokens)} if tokens.exists() and not self.validation else {}
        samples = enumerate(whole_rows(self.path, SAMPLE), 1)
        return [row | {"line": number, "trained": trained.get(row["sample_id"], {})} for number, row in samples]


@dataclass
class RunData:
    """What the folder of a run holds.

    metrics: the lines of metrics.jsonl, oldest first. config, origins: dotted key -> value, and who set it, of the last start. starts: the
    lines of environment.jsonl, one for each time the run was started.
    """

    path: Path
    metrics: list[dict[str, float]]
    config: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[int, StepCounts] = field(default_factory=dict)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric where it has a finite value."""
        points = [(int(m["step"]), m[name]) for m in self.metrics if math.isfinite(m.get(name, math.nan))]
        return [s for s, _ in points], [v for _, v in points]

    @cached_property
    def metrics_by_step(self) -> dict[int, dict[str, float]]:
        return {int(line["step"]): {k: v for k, v in line.items() if k not in ("step", "time")} for line in self.metrics}

    def number(self, key: str, otherwise: float) -> float:
        """The value of a key with a number, of the last start. Raises UserError when config.yaml was changed and has no number there."""
        value = self.config.get(key)
        if value is not None and not NUMBER.holds(value):
            raise UserError(f"{self.path / CONFIG_FILE}: {key} is {value}, no number; {CHANGED}")
        return otherwise if value is None else float(value)

    def environment_at(self, step: int) -> dict[str, Any]:
        """The environment of the start that made this step; empty when none was recorded."""
        made = [s for s in self.starts if s["first_step"] <= max(step, 1)]
        return made[-1] if made else {}

    def config_at(self, step: int) -> dict[str, Any]:
        """The settings of the start that made this step; a resumed run may have other settings."""
        settings = self.environment_at(step).get("settings", {})  # written as in config.yaml, which other runs may have alone
        return dict(_leaves({key: python_value(parse(dump(value), key)) for key, value in settings.items()}, "")) or self.config

    @cached_property
    def status(self) -> dict[str, Any]:
        return read_status(self.path)

    @cached_property
    def files(self) -> list[SampleFile]:
        return sample_files(RunPaths(self.path))

    def samples(self, step: int) -> dict[str, Sample]:
        """The samples of a step by their ids; empty when the step left no such file."""
        return _by_id(RunPaths(self.path).samples(step))

    def validation(self, step: int) -> dict[str, Sample]:
        """The validation samples of a step by their ids; empty when the step was not validated."""
        return _by_id(RunPaths(self.path).validation(step))

    def checkpoint_weights(self) -> dict[int, str]:
        """Checksums of the exported weights of every complete checkpoint."""
        paths = RunPaths(self.path)
        models = {step: paths.checkpoint(step) / "hf" for step in paths.complete_checkpoints()}
        return {step: weights_checksum(model) for step, model in models.items() if (model / "config.json").is_file()}


def open_run(path: Path) -> RunData:
    """Everything but the samples' text. Raises UserError when the folder holds no run."""
    refuse_missing(path)
    if not (path / METRICS_FILE).is_file():
        raise UserError(f"{path}: no {METRICS_FILE} here; give the folder of a run: <runner.output_dir>/<runner.experiment_name>")
    file = path / CONFIG_FILE
    config = read_config(file) if file.exists() else {}
    return RunData(path, read_metrics(path), config, read_origins(file) if config else {}, read_starts(path))


def refuse_missing(path: Path) -> None:
    """Raise UserError when there is no such folder."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such folder"
        raise UserError(f"{path}: {what}; give the folder of a run: <runner.output_dir>/<runner.experiment_name>")


def count_all(run: RunData) -> Iterator[tuple[SampleFile, list[dict[str, Any]]]]:
    """Read all sample files, one after another, to fill run.counts."""
    markers = run.starts[-1].get("chat_markers", []) if run.starts else []
    for file in run.files:
        rows = file.rows()
        if not file.validation:
            run.counts[file.step] = count_samples(rows, markers)
        yield file, rows


def sample_files(run: RunPaths) -> list[SampleFile]:
    """The sample files in the order of steps; the validation of a step comes after it."""
    found = [(step, validation) for validation in (False, True) for step in run.steps_of("validation" if validation else "step")]
    return [SampleFile(run, step, validation) for step, validation in sorted(found)]


def read_trained(path: Path) -> list[dict[str, Any]]:
    return _rows(path, TRAINED, lambda row: SHOWN if "pieces" in row else {})


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of environment.jsonl, one for each time the run was started; none when there is no such file."""
    path = run_dir / ENVIRONMENT_FILE
    return _rows(path, START, lambda row: {name: kind for name, kind in OF_A_START.items() if name in row}) if path.exists() else []


def _rows(path: Path, fields: Mapping[str, Kind], more: Callable[[dict[str, Any]], Mapping[str, Kind]]) -> list[dict[str, Any]]:
    """The lines of a sample file. more: fields that a line must also have."""
    rows = whole_rows(path, fields)
    for number, row in enumerate(rows, 1):
        if wrong := misfit(row, more(row)):
            raise damaged(path, number, wrong)
    return rows


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a config.yaml, by dotted key. Raises UserError when it holds none."""
    tree = python_value(parse(file.read_bytes(), str(file)))
    config = dict(_leaves(tree, "")) if isinstance(tree, dict) else {}
    if not config:
        raise UserError(f"{file}: holds no settings; {CHANGED}")
    return config


def read_origins(file: Path) -> dict[str, str]:
    """Who set each key, from the comments that RunFolder writes after the values, which a YAML parser leaves out."""
    found: dict[str, str] = {}
    sections: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text, _, origin = line.rpartition(" # ") if " # " in line else (line, "", "")
        match = SETTING.match(text)
        if match is None:
            continue
        sections = sections[: len(match["indent"]) // 2]
        if match["value"].strip():
            found[".".join([*sections, match["key"]])] = origin
        else:
            sections.append(match["key"])
    return found


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The leaves of the YAML tree. A key whose value is a mapping of the user's, such as the placement, is a leaf too."""
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known_keys():
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _by_id(file: Path) -> dict[str, Sample]:
    return {row["sample_id"]: row for row in whole_rows(file, SAMPLE)} if file.is_file() else {}
