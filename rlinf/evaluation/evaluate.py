"""`rlinf eval`: evaluates every model on every benchmark of the configuration, with the same cluster and workers as training."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.processes import new_run_id, terminate_as_interrupt
from rlinf.cluster.usage import Usage
from rlinf.config.load import Resolved, load
from rlinf.config.model import load_model_config
from rlinf.config.schema import Config
from rlinf.config.validate import validate_evaluation
from rlinf.data.prompts import problems_fingerprint
from rlinf.data.tokenizer import TextTokenizer, tokenizer_of
from rlinf.evaluation.folder import SetFolder, hold
from rlinf.evaluation.models import Model, models_of, parse_words
from rlinf.evaluation.opencompass import export
from rlinf.evaluation.problems import SHARE, ProblemSet, check_context, load_sets
from rlinf.evaluation.results import SetResult, benchmark_table, compare, read_tally, score, to_json
from rlinf.evaluation.runner import EvaluationRunner, Progress
from rlinf.files import as_json, read_json, write_whole
from rlinf.launch.train import launch_generation
from rlinf.metrics.logger import MetricLogger
from rlinf.rewards.tasks import judge_identity
from rlinf.rollout.contract import SamplingParams, Stop
from rlinf.run_paths import METRICS_FILE
from rlinf.runners.requests import GroupRequest
from rlinf.scheduling.placement import build_evaluation_plan
from rlinf.weights.architecture import read_architecture
from rlinf.weights.checksum import weights_checksum

WIDTH = 150  # columns of the table where the output is not a terminal
PACKAGES = ("torch", "transformers", "tokenizers", "math-verify")


@dataclass(frozen=True)
class Task:
    """The evaluation of one model: its problem sets, tokenized for it, and the configuration of its workers."""

    model: Model
    config: Config
    tokenizer: TextTokenizer
    sets: tuple[ProblemSet, ...]


def main(words: Sequence[str]) -> int:
    """`rlinf eval [CONFIG] [MODEL_DIR ...] [key=value ...]`. Returns 0 when every sample is on disk and the results are written."""
    name, folders, settings = parse_words(words)
    if folders:
        settings = [*settings, f"rollout.model_dir={json.dumps(folders[0])}"]
    resolved = load(name, settings)
    config = resolved.config
    validate_evaluation(config, resolved.provenance)
    out = Path(config.evaluation.output_dir).resolve()
    tasks = [prepare(config, model) for model in models_of(folders or [config.rollout.model_dir])]
    terminate_as_interrupt()
    with ExitStack() as locks:
        for task in tasks:
            locks.enter_context(hold(out / task.model.name))
        identities = [[identity(task, s) for s in task.sets] for task in tasks]
        folders_of = [open_folders(out, task, those) for task, those in zip(tasks, identities)]  # all refusals before any work
        results: list[SetResult] = []
        for task, set_folders in zip(tasks, folders_of):
            generate(task, set_folders, out)
            results += conclude(resolved, task, set_folders)
        show(results, out)
    return 0


def prepare(config: Config, model: Model) -> Task:
    """Read the model's tokenizer and every problem. Raises UserError for what cannot be evaluated."""
    positions = read_architecture(load_model_config(str(model.path)), model.path / "config.json").max_positions
    tokenizer = tokenizer_of(config, str(model.path))
    sets = load_sets(config, tokenizer)
    context = check_context(sets, positions, str(model.path))
    return Task(model, worker_config(config, model, context, max(s.protocol.max_tokens for s in sets)), tokenizer, tuple(sets))


def worker_config(config: Config, model: Model, context: int, max_tokens: int) -> Config:
    """The configuration of engines and reward workers: this model, this context, groups of at most SHARE, logs in its folder, and no
    reward except for right and wrong."""
    sampling = replace(config.algorithm.sampling_params, max_new_tokens=max_tokens)
    out = str(Path(config.evaluation.output_dir).resolve())
    return replace(
        config,
        runner=replace(config.runner, seq_length=context, output_dir=out, experiment_name=model.name),
        algorithm=replace(config.algorithm, group_size=SHARE, sampling_params=sampling),
        rollout=replace(config.rollout, model_dir=str(model.path)),
        reward=config.reward.of_verdicts(),
    )


def identity(task: Task, problems: ProblemSet) -> dict[str, Any]:
    """All that the samples depend on, except for paths and layout."""
    rollout = task.config.rollout
    return {
        "weights": weights_checksum(task.model.path),
        "problems": problems_fingerprint(problems.prompts),
        "protocol": problems.protocol_json(),
        "engine": {
            "backend": rollout.rollout_backend,
            "precision": rollout.precision or task.config.actor.model.precision,
            "seed": rollout.seed,
            "end_tokens": list(task.tokenizer.eos_token_ids),  # generation_config.json names some, and is no part of the weights
        }
        | ({"sglang": dict(rollout.sglang)} if rollout.rollout_backend == "sglang" else {}),
        "judge": judge_identity(task.config.reward),
    }


def open_folders(out: Path, task: Task, identities: Sequence[dict[str, Any]]) -> list[SetFolder]:
    return [SetFolder(out / task.model.name / s.name, those, s.units()) for s, those in zip(task.sets, identities)]


def generate(task: Task, folders: Sequence[SetFolder], out: Path) -> None:
    """Generate the samples that are missing on disk. Everything that was started is ended, however this returns."""
    wanted = [group for s, folder in zip(task.sets, folders) for group in missing_groups(s, folder, task.tokenizer)]
    total = sum(unit.count for folder in folders for unit in folder.units.values())
    done = total - sum(group.n for group in wanted)
    name = task.model.name
    if not wanted:
        _say(f"{name}: all {total} samples are there already")
        return
    run_id = new_run_id()
    _say(f"{name}: {total - done} of {total} samples to generate; run {run_id}, results in {out / name}")
    usage = Usage(run_id)
    cluster = Cluster.connect(task.config.cluster, run_id, out / name / "workers")
    try:
        plan = build_evaluation_plan(task.config, cluster.inventory())
        groups = launch_generation(cluster, plan, task.config)
        runner = EvaluationRunner(task.config, cluster, progress=Progress(name, total, done), **groups)
        with usage.sampling(lambda: cluster.phase):
            asyncio.run(cluster.guard(runner.run(wanted)))
    finally:
        cluster.close()
    _say(usage.describe())
    for folder in folders:
        folder.done = folder.gather()


def missing_groups(problems: ProblemSet, folder: SetFolder, tokenizer: TextTokenizer) -> list[GroupRequest]:
    """What to ask of the engines: the units of which no samples are on disk yet. Each reward worker writes to a file of its own."""
    p = problems.protocol
    stop = Stop(token_ids=tuple(tokenizer.eos_token_ids), strings=tuple(p.stop))
    how = SamplingParams(p.temperature, p.top_p, p.top_k), stop, p.max_tokens, lambda judge: str(folder.part(judge))
    missing = [unit for unit in problems.units() if unit.group_id not in folder.done]
    return [GroupRequest(unit.group_id, unit.prompt, unit.count, *how) for unit in missing]


def conclude(resolved: Resolved, task: Task, folders: Sequence[SetFolder]) -> list[SetResult]:
    """Compute the scores of one model from its samples: results.json, and the OpenCompass files when they are asked for."""
    results = []
    for s, folder in zip(task.sets, folders):
        ids = [p.prompt_id for p in s.prompts]
        tally = read_tally(folder.samples, ids, s.protocol.n)
        result = SetResult(task.model.name, task.model.series, task.model.step, s.name, tally, score(tally))
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        data = {"path": str(s.protocol.path), "sha256": s.sha256}
        details = {"model_dir": str(task.model.path), "data": data, "identity": folder.identity, "versions": versions}
        folder.write_results(to_json(result, details))
        work_dir = resolved.config.evaluation.opencompass_dir
        if work_dir is not None:
            _say(f"predictions for OpenCompass: {export(folder.samples, ids, Path(work_dir), task.model.name, s.name)}")
        results.append(result)
    return results


def show(results: Sequence[SetResult], out: Path) -> None:
    """Print tables, write curves for TensorBoard, and with several models comparison.json."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=WIDTH)
    benchmarks = list(dict.fromkeys(r.benchmark for r in results))
    versus = []
    for benchmark in benchmarks:
        those = [r for r in results if r.benchmark == benchmark]
        console.print(benchmark_table(those))
        versus += [compare(those[0], other) for other in those[1:]]
    if versus:
        write_whole(out / "comparison.json", as_json(versus))
        _say(f"comparison: {out / 'comparison.json'}")
    write_curves(results, out / "curves")
    _say(f"results: {out}/<model>/<benchmark>/results.json\ncurves: tensorboard --logdir {out / 'curves'} --port 6006")


def write_curves(results: Sequence[SetResult], folder: Path) -> None:
    """Write the TensorBoard scalars of each series over its steps, including earlier evaluations, anew from points.json.

    A kill at any instant loses no point: points.json is complete before anything is removed, and the rest is made from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another evaluation may be of the same series
        for series in dict.fromkeys(r.series for r in results):
            file = folder / series / "points.json"
            file.parent.mkdir(exist_ok=True)
            points: dict[str, dict[str, float]] = read_json(file) if file.exists() else {}
            for r in (r for r in results if r.series == series):
                scores = {f"benchmark/{r.benchmark}/{name}": score.value for name, score in r.scores.items()}
                points[str(r.step)] = points.get(str(r.step), {}) | scores
            write_whole(file, as_json(points))
            shutil.rmtree(file.with_name("tensorboard"), ignore_errors=True)
            file.with_name(METRICS_FILE).unlink(missing_ok=True)
            logger = MetricLogger(file.parent, ["tensorboard"])
            for step in sorted(points, key=int):
                logger.log(int(step), points[step])
            logger.close()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
