"""`rlinf replay RUN_DIR --step N`: runs a journalled step again from disk, and shows its metrics beside the recorded ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlinf.config.keys import known_keys
from rlinf.config.load import Resolved, load, value_of
from rlinf.config.schema import Config
from rlinf.config.validate import validate
from rlinf.errors import UserError
from rlinf.launch.debug import train_only
from rlinf.launch.train import train
from rlinf.metrics.logger import read_metrics
from rlinf.report.compare import NOT_COMPARED, relative
from rlinf.report.run_data import open_run, refuse_missing
from rlinf.run_paths import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, RunPaths, step_name
from rlinf.runners.recorded import RecordedSteps, ranges

FP32, HALF = 1e-5, 0.02  # difference that counts as rounding: another layout sums in another order
WIDTH = 140  # of a table in a file
IGNORED = (*NOT_COMPARED, "eval/*")
QUIET = (
    "runner.save_interval=0", "runner.val_check_interval=0", "runner.on_hang=abort", "runner.logger.logger_backends=[]",
    "runner.keep_groups=0", "runner.profile_steps=[]",
)  # fmt: skip

OWN = ("runner.output_dir", "runner.experiment_name", "runner.resume_dir", "runner.max_steps")  # which step, from where, into which folder
OF_SAMPLES = ("reward.*", "data.*", "rollout.seed", "algorithm.group_size", "algorithm.sampling_params.*")  # how they are made and judged
TRAINING_READS = (
    "data.seed", "algorithm.sampling_params.temperature", "algorithm.sampling_params.max_new_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A metric of the step, as it was recorded and as it is when the step runs again."""

    name: str
    recorded: float
    replayed: float

    @property
    def difference(self) -> float:
        if math.isnan(self.recorded) and math.isnan(self.replayed):
            return 0.0
        return relative(self.name, self.recorded, self.replayed)


def replay(run_dir: Path, step: int, words: Sequence[str], rollout: bool, from_start: bool, tolerance: float | None) -> int:
    """Print the comparison; 0 when every metric is within the tolerance, else 1.

    rollout: whether its samples are generated and judged again; otherwise it trains on the recorded ones.
    from_start: whether it begins with the start model instead of the checkpoint before the step.
    """
    recorded = recorded_metrics(run_dir, step)
    if any(name.startswith("sft/") for name in recorded):
        raise UserError(
            f"{run_dir}: is a run of `rlinf sft`, which generates nothing, so there are no samples to replay; "
            "`rlinf sft` with runner.resume_dir=<a checkpoint> makes the steps behind it again, with the same bits"
        )
    if from_start and rollout and step > 1:
        raise UserError(
            "--from-start with --rollout: the prompts of a later step are found from the checkpoint before it; leave one of the two out"
        )
    before = None if from_start or step == 1 else checkpoint_before(run_dir, step)
    resolved = resolve(run_dir, step, [*settings(run_dir, step, before), *words])
    # runner.max_steps is where the replay ends, not the length of the run, which rules speak of: the critic's warm-up is shorter
    validate(replace(resolved.config, runner=replace(resolved.config.runner, max_steps=-1)), resolved.provenance)
    refuse_useless([word.partition("=")[0] for word in words], rollout)
    if rollout and resolved.config.algorithm.schedule == "wallclock":
        raise UserError(
            "--rollout: with algorithm.schedule wallclock the clock decided what was sampled under which weights, and that does not happen "
            "again; leave --rollout out to train on the recorded samples"
        )
    if rollout:
        train(resolved)
    else:
        RecordedSteps(run_dir).order(step)
        train_only(resolved, run_dir, step)
    folder = resolved.config.runner.run_dir
    lines = compare_step(recorded, recorded_metrics(folder, step))
    bound = default_tolerance(resolved.config) if tolerance is None else tolerance
    start = f"checkpoint {before.name}" if before else "the start model"
    samples = "samples generated again" if rollout else "the recorded samples"
    console = Console(width=None if Console().is_terminal else WIDTH)  # in a file names are whole
    console.print(table(lines, bound, f"step {step} again, from {start}, with {samples}"))
    beyond = [line for line in lines if not line.difference <= bound]
    console.print(
        f"{len(lines) - len(beyond)} of {len(lines)} metrics are within {bound:g}"
        + (f"; beyond it: {', '.join(line.name for line in beyond)}" if beyond else "")
        + f"\nthe replay's own folder: {folder}",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
    return 1 if beyond else 0


def refuse_useless(keys: Sequence[str], rollout: bool) -> None:
    """Raise UserError that names the first key that was set and changes nothing in such a replay."""
    for key in keys:
        if key in OWN:
            raise UserError(f"{key}: a replay sets it by itself, from RUN_DIR, --step and --from-start; leave it out")
        if key == "data.val_data_paths":
            raise UserError(f"{key}: has no effect on a step that runs again; leave it out")
        if not rollout and key not in TRAINING_READS and any(fnmatchcase(key, pattern) for pattern in OF_SAMPLES):
            raise UserError(
                f"{key}: has no effect where the recorded samples are trained on; add --rollout, which generates and judges them again, "
                "or leave it out"
            )


def recorded_metrics(run_dir: Path, step: int) -> Mapping[str, float]:
    """The recorded metrics of the step. Raises UserError when the folder holds no run, or no such step."""
    refuse_missing(run_dir)
    if not (run_dir / METRICS_FILE).is_file() or not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir}: no run here ({METRICS_FILE} and {CONFIG_FILE}); give <runner.output_dir>/<runner.experiment_name>")
    steps = {int(line["step"]): line for line in read_metrics(run_dir)}
    if step < 1 or step not in steps:
        known = ranges(sorted(s for s in steps if s > 0))
        raise UserError(f"--step {step}: {run_dir / METRICS_FILE} has no such step" + (f"; it has {known}" if known else ""))
    return {name: value for name, value in steps[step].items() if name not in ("step", "time")}


def checkpoint_before(run_dir: Path, step: int) -> Path:
    """The checkpoint before the step. Raises UserError that names the steps which can be replayed when there is none."""
    paths = RunPaths(run_dir)
    before, complete = paths.checkpoint(step - 1), paths.complete_checkpoints()
    if step - 1 in complete:
        return before.resolve()
    behind = {1} | {saved + 1 for saved in complete}
    can = ranges(sorted(behind & {*RecordedSteps(run_dir).steps}))
    raise UserError(
        f"--step {step}: there is no complete checkpoint of step {step - 1} ({before}). Steps that can be replayed: {can or 'none'}; "
        "any journalled step with --from-start, from the start model (runner.save_interval and runner.keep_checkpoints decide what is kept)"
    )


def resolve(run_dir: Path, step: int, words: Sequence[str]) -> Resolved:
    """The settings with which the step was made, with `words` applied. config.yaml holds those of the last start, which may have been
    others."""
    now = load(str(run_dir / CONFIG_FILE)).config
    recorded = open_run(run_dir).environment_at(step).get("settings", {})
    then = {
        key: json.dumps(recorded[key], ensure_ascii=False)
        for key in known_keys()
        if key in recorded and recorded[key] != json.loads(json.dumps(value_of(now, key)))
    }
    resolved = load(str(run_dir / CONFIG_FILE), [*(f"{key}={value}" for key, value in then.items()), *words])
    for key in then.keys() - {word.partition("=")[0] for word in words}:
        resolved.provenance[key] = str(run_dir / ENVIRONMENT_FILE)  # nobody has asked for it now
    return resolved


def settings(run_dir: Path, step: int, before: Path | None) -> list[str]:
    """Settings for a run of this one step, in a folder of its own inside the run's."""
    replays, number = run_dir.resolve() / "replays", 1
    while (replays / (name := step_name(step) + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    place = [f"runner.output_dir={replays}", f"runner.experiment_name={name}", f"runner.resume_dir={before or 'null'}"]
    return [*place, f"runner.max_steps={step}", *QUIET]


def default_tolerance(config: Config) -> float:
    return FP32 if config.actor.model.precision == "fp32" else HALF


def compare_step(recorded: Mapping[str, float], replayed: Mapping[str, float]) -> list[Line]:
    """The metrics that both have, without times, speeds and held-out problems."""
    names = [n for n in recorded if n in replayed and not any(fnmatchcase(n, pattern) for pattern in IGNORED)]
    return [Line(n, recorded[n], replayed[n]) for n in names]


def table(lines: Sequence[Line], tolerance: float, title: str) -> Table:
    shown = Table(title=title)
    for column in ("metric", "recorded", "replayed", f"difference (tolerance {tolerance:g})"):
        shown.add_column(column, justify="left" if column == "metric" else "right")
    for line in lines:
        numbers = (f"{line.recorded:.9g}", f"{line.replayed:.9g}", f"{line.difference:.2g}" if line.difference else "")
        shown.add_row(line.name, *numbers, style=None if line.difference <= tolerance else "bold red")
    return shown
