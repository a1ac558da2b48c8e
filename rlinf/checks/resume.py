"""`rlinf check resume`: a run that is killed again and again ends with the same result as a run that is not killed.

The models are tiny, everything else is real. Each run is killed by SIGKILL at random instants (checks.killing), resumed with
runner.resume_dir=auto, and at its end compared with an uninterrupted run: weights and Adam moments, id and text of every sample trained on,
the curves.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rlinf.checks.killing import Kill, Life, newest_checkpoint, plan_kills
from rlinf.checks.tiny_model import write_tiny_model, write_tiny_tokenizer
from rlinf.errors import UserError
from rlinf.metrics.logger import read_metrics
from rlinf.run_folder.checkpoints import read_checkpoint
from rlinf.run_paths import RunPaths
from rlinf.weights.checkpoint_part import KINDS, open_part
from rlinf.weights.tensor_folder import open_hf_folder

SAVE_INTERVAL = 2
RESUME = ("runner.resume_dir=auto",)
OTHER_LAYOUT = 1e-6  # largest difference of a weight
CURVES = ("train/loss", "train/grad_norm", "train/entropy_loss", "rollout/rewards", "rollout/total_tokens")  # what time has no part in


@dataclass(frozen=True)
class Chain:
    """One run and its kills. layout: `one process` or `Ray TP2`."""

    name: str
    layout: str
    background: bool
    steps: int
    kills: tuple[str, ...]

    @property
    def alone(self) -> bool:
        return self.layout == "one process"

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")


CHAINS = (
    Chain("one process", "one process", False, 20, ("start", *["checkpoint"] * 3, "sync", *["random"] * 3)),
    Chain("one process, checkpoints in the background", "one process", True, 20, (*["checkpoint"] * 3, "sync", *["random"] * 2)),
    Chain("Ray, 2 actor ranks", "Ray TP2", False, 20, ("checkpoint", "sync", *["random"] * 4)),
)
QUICK = (Chain("one process", "one process", False, 14, ("checkpoint", "checkpoint", "sync", "random", "start")),)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {"cluster.backend": "local", "cluster.num_gpus_per_node": 1,
                    "cluster.component_placement": {"actor,rollout,reward": "0"}},
    "Ray TP2": {"cluster.backend": "ray", "cluster.num_gpus_per_node": 2,
                "cluster.component_placement": {"actor": "0-1", "rollout,reward": "0"}, "actor.model.tensor_model_parallel_size": 2,
                "rollout.max_engine_restarts": 0},  # here the death of an engine is to end the run too
}  # fmt: skip
VICTIMS = {"one process": ("driver",), "Ray TP2": ("driver", "actor-0", "actor-1", "rollout-0")}


@dataclass(frozen=True)
class Death:
    """One kill, and what the process after it did. lost: how many steps it made again. allowed: how many it may at most."""

    chain: str
    kill: Kill
    where: str
    last_step: int
    resumed_at: int
    newest: int
    allowed: int
    seconds: float

    @property
    def lost(self) -> int:
        return self.last_step - self.resumed_at

    @property
    def holds(self) -> bool:
        return self.resumed_at == self.newest and self.lost <= self.allowed


@dataclass(frozen=True)
class Ending:
    """A finished run compared with the uninterrupted one: the largest difference of a weight and of a moment, and what is wrong with its
    records.

    moved: the largest change of a weight by the training; if there were none, equal ends would prove nothing.
    """

    chain: str
    tolerance: float
    moved: float
    weights: float
    moments: float
    wrong: tuple[str, ...]

    @property
    def holds(self) -> bool:
        same = self.weights <= self.tolerance and (self.moments == 0 or self.tolerance > 0)
        return same and not self.wrong and self.moved > max(1e-4, 100 * self.tolerance)


class Bench:
    """A folder with a model, data, and the runs of this check."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        (folder / "runs").mkdir()
        write_tiny_tokenizer(write_tiny_model(folder / "model", "qwen2-tied"))
        problems = [{"prompt": f"{i}+{i}=", "task": "math", "query_id": str(i), "solutions": [f"\\boxed{{{2 * i}}}"]} for i in range(24)]
        (folder / "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))

    def config(self, name: str, layout: str, steps: int, background: bool = False) -> Path:
        """The YAML of a run."""
        values: dict[str, Any] = {
            "cluster.device": "cpu", "cluster.threads_per_worker": 1, "runner.output_dir": str(self.folder / "runs"),
            "runner.experiment_name": name, "runner.max_steps": steps, "runner.max_epochs": 99,
            "runner.seq_length": 40, "runner.max_tokens_per_mbs": 64, "runner.val_check_interval": 0, "runner.save_interval": SAVE_INTERVAL,
            "runner.async_checkpoint": background, "runner.logger.logger_backends": [],
            "data.train_data_paths": [str(self.folder / "data.jsonl")], "data.max_prompt_length": 16, "data.rollout_batch_size": 4,
            "algorithm.group_size": 4, "algorithm.n_minibatches": 2, "algorithm.sampling_params.max_new_tokens": 12,
            "algorithm.shuffle_rollout": True,
            "rollout.model_dir": str(self.folder / "model"), "rollout.rollout_backend": "embedded", "rollout.max_running_requests": 8,
            "actor.model.precision": "fp32", "actor.optim.lr": 1e-3, "actor.optim.adam_eps": 1e-3,
            "reward.format_reward": 1.0, "reward.exploration_penalty": 3.0,
        } | LAYOUTS[layout]  # fmt: skip
        tree: dict[str, Any] = {}
        for key, value in values.items():
            *sections, last = key.split(".")
            section = tree
            for part in sections:
                section = section.setdefault(part, {})
            section[last] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name


def kill_again_and_again(bench: Bench, chain: Chain, reference: Path, seed: int) -> Iterator[Death]:
    """Run, kill and resume through all kills of the chain; the run is left as after the last kill."""
    config, run_dir = bench.config(chain.folder, chain.layout, chain.steps, chain.background), bench.run_dir(chain.folder)
    lines = read_metrics(reference)
    step_seconds = (lines[-1]["time"] - lines[0]["time"]) / (len(lines) - 1)
    kills = plan_kills(chain.kills, chain.steps, VICTIMS[chain.layout], seed)
    deaths: list[Death] = []
    allowed = SAVE_INTERVAL - 1 + (SAVE_INTERVAL if chain.background else 0)
    for kill in kills:
        started = time.perf_counter()
        life = Life.start(config, run_dir, RESUME, fork=chain.alone)
        life.die(kill, step_seconds, 1.0)
        if deaths:
            yield replace(deaths[-1], resumed_at=life.resumed_at())
        newest = newest_checkpoint(run_dir)
        if newest:
            read_checkpoint(RunPaths(run_dir).latest.resolve())  # whole, whatever was going on
        deaths.append(Death(chain.name, kill, life.where, life.last_step(), 0, newest, allowed, time.perf_counter() - started))
    yield deaths[-1]  # the caller learns from the next life where it resumed


def finish(config: Path, run_dir: Path, alone: bool) -> Life:
    life = Life.start(config, run_dir, RESUME, fork=alone)
    life.finish()
    return life


def compare(chain: str, run_dir: Path, reference: Path, model: Path, steps: int, tolerance: float) -> Ending:
    """Compare the finished run with the uninterrupted one. In another layout, texts and curves may differ in the last digit, but not
    ids."""
    ours, theirs = (open_part(RunPaths(d).latest.resolve() / "actor") for d in (run_dir, reference))
    gaps = {kind: max(float((ours[kind][n] - t).abs().max()) for n, t in theirs[kind].items()) for kind in KINDS}
    start = open_hf_folder(model)
    moved = max(float((ours["param"][n] - t).abs().max()) for n, t in start.items())
    wrong = []
    for step in range(1, steps + 1):
        wrong += compare_samples(step, read_samples(run_dir, step), read_samples(reference, step), texts=tolerance == 0)
    wrong += compare_curves(run_dir, reference, steps, exact=tolerance == 0)
    return Ending(chain, tolerance, moved, gaps["param"], max(gaps["exp_avg"], gaps["exp_avg_sq"]), tuple(wrong))


def compare_curves(run_dir: Path, reference: Path, steps: int, exact: bool) -> list[str]:
    """What is wrong with the run's metrics. exact: whether their values must be those of the reference."""
    try:
        lines, expected = read_metrics(run_dir), read_metrics(reference)
    except UserError as error:  # a step twice, or not a number
        return [str(error)]
    if [line["step"] for line in lines] != list(range(1, steps + 1)):
        return [f"metrics.jsonl has the steps {[int(line['step']) for line in lines]}"]
    return [
        f"{key} of step {a['step']:.0f}: {a[key]} instead of {b[key]}"
        for a, b in zip(lines, expected)
        for key in CURVES
        if exact and a[key] != b[key]
    ]


def read_samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    file = RunPaths(run_dir).samples(step)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def compare_samples(step: int, got: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]], texts: bool) -> list[str]:
    """What is wrong with the samples of a step: some are trained on twice, missing, unknown, or different."""
    count, wanted = Counter(s["sample_id"] for s in got), {s["sample_id"]: s for s in expected}
    wrong = [f"step {step}: sample {name} {n} times" for name, n in count.items() if n > 1]
    wrong += [f"step {step}: sample {name} was skipped" for name in wanted.keys() - count.keys()]
    wrong += [f"step {step}: sample {name} does not belong here" for name in count.keys() - wanted.keys()]
    if texts:
        same = ("response", "reward", "versions", "finish")
        differ = [s["sample_id"] for s in got if s["sample_id"] in wanted and any(s[k] != wanted[s["sample_id"]][k] for k in same)]
        wrong += [f"step {step}: sample {name} differs" for name in differ]
    return wrong


def check(bench: Bench, chains: Sequence[Chain]) -> Iterator[Death | Ending]:
    """Run all chains, one after another; a run under Ray is also resumed in one process."""
    references: dict[tuple[str, int], Path] = {}
    for number, chain in enumerate(chains):
        key = (chain.layout, chain.steps)
        if key not in references:
            name = f"uninterrupted-{chain.layout}".replace(" ", "-")
            Life.start(bench.config(name, chain.layout, chain.steps), bench.run_dir(name)).finish()
            references[key] = bench.run_dir(name)
        reference = references[key]
        *deaths, last = kill_again_and_again(bench, chain, reference, 1000 * bench.seed + number)
        yield from deaths
        run_dir, model = bench.run_dir(chain.folder), bench.folder / "model"
        if not chain.alone:
            elsewhere = bench.run_dir(f"{chain.folder}-elsewhere")
            shutil.copytree(run_dir, elsewhere, symlinks=True)
            finish(bench.config(elsewhere.name, "one process", chain.steps), elsewhere, alone=True)
            yield compare(f"{chain.name}; in one process after the last kill", elsewhere, reference, model, chain.steps, OTHER_LAYOUT)
        yield replace(last, resumed_at=finish(bench.folder / f"{chain.folder}.yaml", run_dir, chain.alone).resumed_at())
        yield compare(chain.name, run_dir, reference, model, chain.steps, 0.0)


def deaths_table(deaths: Sequence[Death]) -> Table:
    out = Table(title="SIGKILLs", title_justify="left")
    for name in ("run", "kind", "killed", "while it was at", "last step", "went on after", "steps again", "s", ""):
        out.add_column(name, justify="right" if name in ("last step", "went on after", "steps again", "s") else "left", no_wrap=True)
    for d in deaths:
        out.add_row(d.chain, d.kill.kind, d.kill.victim, d.where, str(d.last_step), str(d.resumed_at), f"{d.lost} of {d.allowed}",
                    f"{d.seconds:.1f}", "ok" if d.holds else "[red]FAILS[/]")  # fmt: skip
    return out


def endings_table(endings: Sequence[Ending]) -> Table:
    out = Table(title="Their ends, beside the runs that nobody killed", title_justify="left")
    for name in ("run", "training moved a weight by", "weights differ by", "at most", "moments differ by", "samples and curves", ""):
        out.add_column(name, no_wrap=True)
    for e in endings:
        record = f"{len(e.wrong)} wrong" if e.wrong else "each sample once, the same"
        out.add_row(
            e.chain,
            f"{e.moved:.1e}",
            f"{e.weights:.1e}",
            f"{e.tolerance:.0e}",
            f"{e.moments:.1e}",
            record,
            "ok" if e.holds else "[red]FAILS[/]",
        )
    return out


def main(quick: bool, json_file: Path | None, seed: int) -> int:
    """The command. Exit code 0 when everything holds, else 1."""
    started = time.perf_counter()
    console = Console(width=None if Console().is_terminal else 190)
    chains = QUICK if quick else CHAINS
    deaths: list[Death] = []
    endings: list[Ending] = []
    with tempfile.TemporaryDirectory(prefix="rlinf-resume-") as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("kills", total=sum(len(c.kills) for c in chains))
        for finding in check(Bench(Path(folder), seed), chains):
            if isinstance(finding, Death):
                deaths.append(finding)
                progress.advance(task)
            else:
                endings.append(finding)
    seconds = time.perf_counter() - started
    holds = all_hold(deaths, endings)
    console.print(deaths_table(deaths))
    console.print(endings_table(endings))
    for line in [line for e in endings for line in e.wrong[:5]]:
        console.print(line, style="red", highlight=False)
    console.print(
        f"{len(deaths)} kills, {len(endings)} ends compared: {'everything holds' if holds else 'NOT everything holds'}; {seconds:.0f} s",
        highlight=False,
    )
    if json_file:
        json_file.write_text(json.dumps(report(deaths, endings, seed, seconds), indent=1) + "\n")
    return 0 if holds else 1


def all_hold(deaths: Sequence[Death], endings: Sequence[Ending]) -> bool:
    return all(d.holds for d in deaths) and all(e.holds for e in endings)


def report(deaths: Sequence[Death], endings: Sequence[Ending], seed: int, seconds: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "numpy": np.__version__},
        "seconds": seconds,
        "holds": all_hold(deaths, endings),
        "kills": [asdict(d) | {"lost": d.lost, "holds": d.holds} for d in deaths],
        "ends": [asdict(e) | {"holds": e.holds} for e in endings],
    }
