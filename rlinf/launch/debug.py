"""`rlinf train --debug-rollout-only` and `--debug-train-only RUN_DIR`: half a run, from a resolved configuration to its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlinf.config.load import Resolved
from rlinf.errors import UserError
from rlinf.launch.prepare import PROMPTS, open_run, prepare
from rlinf.launch.restarts import with_restarts
from rlinf.launch.session import open_session
from rlinf.launch.train import WORKERS, launch_generation
from rlinf.run_folder.resuming import TRAIN, TRAIN_ONLY
from rlinf.runners.debug_runners import RolloutOnlyRunner, TrainOnlyRunner
from rlinf.runners.learner import MegatronGroups
from rlinf.runners.recorded import RecordedSteps, ranges
from rlinf.runners.requests import stop_of
from rlinf.scheduling.placement import build_plan

JOURNAL_WORKER = "rlinf.workers.journal:JournalWorker"


def rollout_only(resolved: Resolved) -> int:
    """Generate and judge every step with the start model, without an actor and without checkpoints."""
    if resolved.config.runner.resume_dir is not None:
        raise UserError(
            "--debug-rollout-only: there are no checkpoints to go on from; "
            "set rollout.model_dir to the hf folder of one, without runner.resume_dir"
        )
    config = replace(resolved.config, runner=replace(resolved.config.runner, save_interval=0))
    resolved = replace(resolved, config=config, provenance=resolved.provenance | {"runner.save_interval": "--debug-rollout-only"})
    run = prepare(resolved, TRAIN, PROMPTS, validates=False)
    with open_session(resolved, run.folder, run.tokenizer, run.sampler.fingerprint) as session:
        plan = build_plan(config, session.nodes)
        groups = launch_generation(session.cluster, plan, config)
        stop = stop_of(config.algorithm, run.tokenizer)
        loop = RolloutOnlyRunner(config, run.folder, session.cluster, prompts=run.training, sampler=run.sampler, stop=stop, **groups)
        session.complete(loop, list(groups.values()))
    return 0


def train_only(resolved: Resolved, source: Path, first: int = 1) -> int:
    """Train, without engines, on the groups that the run in `source` recorded in its journal, from step `first` on; a resumed run begins
    after its checkpoint instead. After a hang, restart as runner.on_hang says."""
    return with_restarts(lambda again: train_only_once(again, source, first), resolved)


def train_only_once(resolved: Resolved, source: Path, first: int) -> int:
    config = resolved.config
    steps = RecordedSteps(source)
    folder, tokenizer = open_run(resolved, TRAIN_ONLY)
    first = folder.resume.step + 1 if folder.resume else first
    last = steps.total_steps(config.runner.max_epochs, config.runner.max_steps)
    missing = sorted({*range(first, last + 1)} - {*steps.steps})
    if missing or last < first:
        what = f"steps {ranges(missing)} are not journalled there" if missing else f"it has nothing behind step {first - 1}"
        raise UserError(f"{source}: {what}; there are steps {ranges(steps.steps)} (runner.keep_groups); set runner.max_steps")
    with open_session(resolved, folder, tokenizer, "") as session:
        plan = build_plan(config, session.nodes)
        groups = {name: session.cluster.launch(plan, name, WORKERS[name], config) for name in config.megatron_roles}
        reader = session.cluster.launch(plan, "reward", JOURNAL_WORKER, config)
        loop = TrainOnlyRunner(config, folder, session.cluster, MegatronGroups(**groups), reader, steps, first)
        session.complete(loop, [*groups.values(), reader])
    return 0
