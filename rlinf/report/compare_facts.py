"""What two run folders say about two runs: configuration, starts, metrics, samples, checkpoints. Reads; decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf.config.settings import parse, python_value
from rlinf.config.values import dump
from rlinf.errors import UserError
from rlinf.metrics.logger import read_metrics
from rlinf.record_files import whole_rows
from rlinf.report.run_data import CHANGED, SAMPLE, read_starts
from rlinf.run_paths import CONFIG_FILE, METRICS_FILE, RunPaths
from rlinf.weights.checksum import weights_checksum

Sample = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """config: dotted key -> value, of the last start. starts: the lines of environment.jsonl, one for each time the run was started.
    metrics: by step."""

    path: Path
    config: dict[str, Any]
    starts: tuple[dict[str, Any], ...]
    metrics: dict[int, dict[str, float]]

    def environment(self, step: int) -> dict[str, Any]:
        """Of the start that made this step; empty when none was recorded."""
        made = [s for s in self.starts if s["first_step"] <= max(step, 1)]
        return made[-1] if made else {}

    def config_at(self, step: int) -> dict[str, Any]:
        """The settings of the start that made this step: one that goes on may have others."""
        settings = self.environment(step).get("settings", {})  # written as in config.yaml, which other runs may have alone
        return dict(_flat({key: python_value(parse(dump(value), key)) for key, value in settings.items()}, "")) or self.config

    def samples(self, step: int) -> dict[str, Sample]:
        return _samples(RunPaths(self.path).samples(step))

    def validation(self, step: int) -> dict[str, Sample]:
        return _samples(RunPaths(self.path).validation(step))

    def checkpoint_weights(self) -> dict[int, str]:
        """Checksums of the exported weights of every complete checkpoint."""
        paths = RunPaths(self.path)
        models = {step: paths.checkpoint(step) / "hf" for step in paths.complete_checkpoints()}
        return {step: weights_checksum(model) for step, model in models.items() if (model / "config.json").is_file()}


def read_run(path: Path) -> Run:
    """Raises UserError when the folder is no run, or a run without a single step."""
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path}: no config.yaml, so no run; give <runner.output_dir>/<runner.experiment_name>")
    if not (path / METRICS_FILE).is_file() or not (lines := read_metrics(path)):
        raise UserError(f"{path}: no {METRICS_FILE} with a step in it: the run ended before its first step, there is nothing to compare")
    tree = python_value(parse((path / CONFIG_FILE).read_bytes(), str(path / CONFIG_FILE)))
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path / CONFIG_FILE}: holds no settings; {CHANGED}")
    config = dict(_flat(tree, ""))
    metrics = {int(line["step"]): {k: v for k, v in line.items() if k not in ("step", "time")} for line in lines}
    return Run(path, config, tuple(read_starts(path)), metrics)


def _flat(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Leaves of the YAML tree. The one value that is a mapping of the user's, the placement, is a leaf too."""
    for name, value in section.items():
        if isinstance(value, dict) and not name.endswith("component_placement"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _samples(file: Path) -> dict[str, Sample]:
    return {row["sample_id"]: row for row in whole_rows(file, SAMPLE)} if file.is_file() else {}
