"""`rlinf compare RUN_A RUN_B`: finds the first step and stage at which two runs differ, and recorded differences that may be the cause.

The stages of a step, in order, are data, generation, verdicts, training. Dumps of samples show in which stage the first difference arose;
metrics show it for what is not dumped. Times, speeds and memory are not compared.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rlinf.errors import UserError
from rlinf.report.run_data import RunData, Sample, open_run, refuse_missing
from rlinf.run_paths import CONFIG_FILE, METRICS_FILE

SMALLEST = 1e-3  # differences are relative to no less: what is zero but for rounding has no relative difference
# The scale of these is 1, however small they are: differences of log-probabilities, in fp32 rounding themselves; and means of terms of both
# signs (advantages), which cancel
OF_SIZE_ONE = ("train/rollout_logprob_gap_*", "train/loss")
STAGES = ("data", "generation", "verdicts", "training")
NOT_COMPARED = ("time/*", "perf/*", "sync/*", "rollout/reused_tokens")  # the machine's doing, or the order of work
STAGE_OF_KEY = (  # the first pattern that matches: where a key acts first; "" = it does not change what is computed
    ("runner.seq_length", "generation"),
    ("runner.max_tokens_per_mbs", "rounding"),
    ("runner.*", ""),
    ("evaluation.*", ""),
    ("cluster.*", "rounding"),
    ("data.val_data_paths", ""),
    ("data.*", "data"),
    ("rollout.verify_weights_every", ""),
    ("rollout.max_running_requests", "rounding"),
    ("rollout.gpu_memory_utilization", "rounding"),
    ("rollout.*", "generation"),
    ("algorithm.group_size", "generation"),
    ("algorithm.sampling_params.*", "generation"),
    ("reward.num_processes", ""),
    ("reward.*", "verdicts"),
    ("actor.offload_*", ""),
    ("actor.model.*_parallel*", "rounding"),
    ("actor.model.recompute_*", "rounding"),
    ("token_reward.offload_weight", ""),
    ("token_reward.model.*_parallel*", "rounding"),
    ("*", "training"),
)
RECORDED = ("weights", "data_fingerprint", "packages", "python", "commit", "gpus", "cpu", "devices_by_node", "chat_markers", "own_code")
STAGE_OF_RECORD = {"weights": "generation", "data_fingerprint": "data", "chat_markers": "data"}  # the rest: any stage


@dataclass(frozen=True)
class Difference:
    """One place where the runs differ. what: a metric, or a part of a sample. a, b: the two values."""

    step: int
    stage: str
    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Candidate:
    """A recorded difference that may be the cause: a configuration key or a fact of the environment, and the first stage on which it
    acts."""

    name: str
    stage: str
    a: Any
    b: Any
    likely: bool


@dataclass(frozen=True)
class Comparison:
    """divergence: the first difference beyond the tolerance. rounding: an earlier one within it. weights: step -> whether the checkpoints
    are equal."""

    runs: tuple[str, str]
    steps: tuple[int, int]
    common_steps: int
    rounding: Difference | None
    divergence: Difference | None
    also: tuple[Difference, ...]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    weights: dict[int, bool]


def main(path_a: Path, path_b: Path, tolerance: float, as_json: bool) -> int:
    """Print the comparison. Returns 0 whether the runs agree or not."""
    comparison = compare(read_run(path_a), read_run(path_b), tolerance)
    sys.stdout.write(json.dumps(asdict(comparison), indent=1, default=str) + "\n" if as_json else describe(comparison))
    return 0


def read_run(path: Path) -> RunData:
    """Open a run to compare. Raises UserError when the folder is not a run, or the run has no step."""
    refuse_missing(path)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path}: no {CONFIG_FILE}, so no run; give <runner.output_dir>/<runner.experiment_name>")
    if not (path / METRICS_FILE).is_file() or not (run := open_run(path)).metrics:
        raise UserError(f"{path}: no {METRICS_FILE} with a step in it: the run ended before its first step, there is nothing to compare")
    return run


def compare(a: RunData, b: RunData, tolerance: float = 1e-6) -> Comparison:
    """Compare two runs. tolerance: relative difference of a metric that counts as rounding. Samples are compared exactly."""
    rounding = divergence = None
    also: tuple[Difference, ...] = ()
    steps = sorted(set(a.metrics_by_step) & set(b.metrics_by_step))
    for step in steps:
        found = list(differences(a, b, step))
        beyond = [d for d in found if not within(d, tolerance)]
        rounding = rounding or next((d for d in found if within(d, tolerance)), None)
        if beyond:
            divergence, also = beyond[0], tuple(beyond[1:])
            break
    at = divergence or rounding
    candidates = tuple(candidates_for(a, b, at, steps)) if at else ()
    weights_a, weights_b = a.checkpoint_weights(), b.checkpoint_weights()
    equal = {step: weights_a[step] == weights_b[step] for step in sorted(set(weights_a) & set(weights_b))}
    last = (max(a.metrics_by_step), max(b.metrics_by_step))
    return Comparison((str(a.path), str(b.path)), last, len(steps), rounding, divergence, also, candidates, tuple(notes(a, b, at)), equal)


def differences(a: RunData, b: RunData, step: int) -> Iterator[Difference]:
    """The differences of one step, in the order of the algorithm: samples, then metrics. Validation belongs to the end of a step."""
    in_samples = first_of_samples(step, a.samples(step), b.samples(step))
    if in_samples:
        yield in_samples
    of_a, of_b = a.metrics_by_step[step], b.metrics_by_step[step]
    for name in [*of_a, *(n for n in of_b if n not in of_a)]:
        if any(fnmatchcase(name, pattern) for pattern in NOT_COMPARED):
            continue
        value_a, value_b = of_a.get(name), of_b.get(name)
        if value_a is None or value_b is None or not _same(value_a, value_b):
            if name.startswith("rollout/") and in_samples is not None:
                stage = in_samples.stage  # a consequence
            else:
                stage = _stage_of_metric(name, step)
            yield Difference(step, stage, name, value_a, value_b)
    in_validation = first_of_samples(step, a.validation(step), b.validation(step))
    if in_validation:
        stage = in_validation.stage if step == 0 or in_validation.stage != "generation" else "training"
        yield Difference(step, stage, f"validation, {in_validation.what}", in_validation.a, in_validation.b)


def first_of_samples(step: int, a: Mapping[str, Sample], b: Mapping[str, Sample]) -> Difference | None:
    """The earliest stage at which two dumps differ; None when they are equal or one is missing."""
    if not a or not b:
        return None
    prompts_a, prompts_b = ({row["group_id"]: row["prompt"] for row in run.values()} for run in (a, b))
    for group in sorted(prompts_a.keys() | prompts_b.keys()):
        if prompts_a.get(group) != prompts_b.get(group):
            return Difference(step, "data", f"prompt of group {group}", prompts_a.get(group), prompts_b.get(group))
    for fields, stage in ((("response", "length", "finish"), "generation"), (("solutions",), "data"), (("status", "reward"), "verdicts")):
        for sample in sorted(a.keys() | b.keys()):
            in_a, in_b = ([run[sample].get(f) for f in fields] if sample in run else None for run in (a, b))
            if in_a != in_b:
                return Difference(step, stage, f"{'/'.join(fields)} of sample {sample}", in_a, in_b)
    return None


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def within(d: Difference, tolerance: float) -> bool:
    """Whether a difference is only rounding: two finite values of a metric that are close."""
    if not (isinstance(d.a, float) and isinstance(d.b, float) and math.isfinite(d.a) and math.isfinite(d.b)):
        return False
    return relative(d.what, d.a, d.b) <= tolerance


def relative(metric: str, a: float, b: float) -> float:
    """The difference of two values of a metric, relative to the larger one, or to the size below which a difference is rounding."""
    least = 1.0 if any(fnmatchcase(metric, pattern) for pattern in OF_SIZE_ONE) else SMALLEST
    return abs(a - b) / max(abs(a), abs(b), least)


def _stage_of_metric(name: str, step: int) -> str:
    """The stage at which a metric is known. Metrics of the rollout are known before training; metrics of the held-out problems at step 0
    too, while at later steps they depend on the trained weights."""
    if name.startswith("rollout/") and "advantages" not in name:
        return "generation"
    return "generation" if name.startswith("eval/") and step == 0 else "training"


def candidates_for(a: RunData, b: RunData, at: Difference, steps: list[int]) -> Iterator[Candidate]:
    """Recorded differences that act at or before the stage where the runs differ. likely: those that act on that very stage.

    Generation may differ because of an earlier step of training that showed no difference (by weight decay, for example). When no recorded
    difference acts there, all of them are candidates.
    """
    trained = at.step > max(min(steps), 1)
    reach = STAGES if trained else STAGES[: STAGES.index(at.stage) + 1]
    likely = {"training"} if trained and at.stage == "generation" else {at.stage}
    found = [*_config_differences(a, b, at.step), *_recorded_differences(a, b, at.step)]
    within_reach = [c for c in found if c[1] in (*reach, "rounding", "any")] or found
    for more in ({*reach, "any"}, {"rounding"}, {*STAGES}):
        if not any(c[1] in likely for c in within_reach):
            likely |= more
    order = (*STAGES, "any", "rounding")
    for name, stage, x, y in sorted(within_reach, key=lambda c: (c[1] not in likely, order.index(c[1]), c[0])):
        yield Candidate(name, stage, x, y, stage in likely)


def _config_differences(a: RunData, b: RunData, step: int) -> Iterator[tuple[str, str, Any, Any]]:
    same_weights = a.environment_at(0).get("weights") == b.environment_at(0).get("weights") is not None
    same_data = a.environment_at(0).get("data_fingerprint") == b.environment_at(0).get("data_fingerprint") is not None
    in_a, in_b = a.config_at(step), b.config_at(step)
    absent = set()  # components that neither run has: nothing reads their keys
    if "gae" not in (in_a.get("algorithm.adv_type"), in_b.get("algorithm.adv_type")):
        absent.add("critic")
    if in_a.get("token_reward.model_dir") is None and in_b.get("token_reward.model_dir") is None:
        absent.add("token_reward")
    for key in [*in_a, *(k for k in in_b if k not in in_a)]:
        if key.partition(".")[0] in absent:
            continue
        if (key == "rollout.model_dir" and same_weights) or (key == "data.train_data_paths" and same_data):
            continue  # another path to the same thing
        stage = stage_of(key)
        if stage and in_a.get(key) != in_b.get(key):
            yield key, stage, in_a.get(key), in_b.get(key)


def stage_of(key: str) -> str:
    """The first stage on which a key acts; "" when it changes nothing that is computed."""
    return next(stage for pattern, stage in STAGE_OF_KEY if fnmatchcase(key, pattern))


def _recorded_differences(a: RunData, b: RunData, step: int) -> Iterator[tuple[str, str, Any, Any]]:
    of_a, of_b = a.environment_at(step), b.environment_at(step)
    for name in RECORDED:
        x, y = of_a.get(name), of_b.get(name)
        if name == "packages" and x and y:
            for package in sorted(x.keys() | y.keys()):
                if x.get(package) != y.get(package):
                    yield f"version of {package}", "any", x.get(package), y.get(package)
        elif name == "own_code" and x is not None and y is not None:
            for own in sorted(x.keys() & y.keys()):  # where another function is named, the key differs
                if x[own] != y[own]:
                    yield f"the file of {own}", stage_of(own.partition(" ")[0]), x[own], y[own]
        elif x is not None and y is not None and x != y:
            yield f"{name} at the start" if name in STAGE_OF_RECORD else name, STAGE_OF_RECORD.get(name, "any"), x, y


def notes(a: RunData, b: RunData, at: Difference | None) -> Iterator[str]:
    """What a reader should also know: resumptions before the divergence, facts that were not recorded."""
    for name, run in (("A", a), ("B", b)):
        for start in run.starts[1:]:
            if at and start["first_step"] <= at.step:
                here = ", where the runs part" if start["first_step"] == at.step else ""
                yield f"{name} was resumed at step {start['first_step']}{here}"
        if not run.starts:
            yield f"{name} has no environment.jsonl: its packages, machine, starting weights and data are not known"
    if at and not (a.samples(at.step) and b.samples(at.step)) and at.step > 0:
        yield f"no samples of step {at.step} in both folders: the stage is told from metrics alone"


def describe(c: Comparison) -> str:
    """The comparison as text."""
    lines = [f"A  {c.runs[0]}  (last step {c.steps[0]})", f"B  {c.runs[1]}  (last step {c.steps[1]})", ""]
    if not c.common_steps:
        return "\n".join([*lines, "the runs have no step in common"]) + "\n"
    if c.divergence is None:
        how = ", but for rounding:" if c.rounding else ", to the last bit"
        lines.append(f"the runs agree on all {c.common_steps} common steps{how}")
    if c.rounding:
        lines.append(f"first difference within the tolerance: step {c.rounding.step}, {_values(c.rounding)}")
    if c.divergence:
        d = c.divergence
        metrics = [x for x in c.also if "/" in x.what and " " not in x.what]
        lines += [f"the runs part at step {d.step}, in {d.stage}:", f"  {_values(d)}", *(f"  {_values(x)}" for x in metrics[:8])]
        lines += [f"  and {len(metrics) - 8} more metrics"] if len(metrics) > 8 else []
    if c.divergence or c.rounding:
        likely, others = [x for x in c.candidates if x.likely], [x for x in c.candidates if not x.likely]
        if likely:
            lines += ["", "the cause:" if len(likely) == 1 else "the cause is among:", *(f"  {_values(x)}" for x in likely)]
        else:
            lines += [
                "",
                "no recorded difference explains it: configuration, data, weights and versions are the same as far as they act there;",
            ]
            lines += ["then it is chance in the computation (GPU kernels, an engine without seeds), or something that is not recorded"]
        if others:
            lines += ["", "other differences, which act elsewhere:", *(f"  {_values(x)}" for x in others)]
    lines += ["", *(f"note: {note}" for note in c.notes)] if c.notes else []
    if c.weights:
        equal = [str(s) for s, same in c.weights.items() if same]
        unequal = [str(s) for s, same in c.weights.items() if not same]
        lines += ["", "weights of checkpoints: " + "; ".join(
            f"{word} at step {', '.join(which)}" for word, which in (("equal", equal), ("different", unequal)) if which
        )]  # fmt: skip
    return "\n".join(lines) + "\n"


def _values(d: Difference | Candidate) -> str:
    return f"{d.name if isinstance(d, Candidate) else d.what}: {_short(d.a)} in A, {_short(d.b)} in B"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = f"{value:.9g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 160 else text[:100] + " … " + text[-50:]
