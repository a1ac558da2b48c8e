"""Half a run, from a resolved configuration to its end: `rlinf train --debug-rollout-only` and `--debug-train-only RUN_DIR`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlinf.config.load import Resolved
from rlinf.data.prompts import load_prompts
from rlinf.data.sampler import PromptSampler
from rlinf.data.tokenizer import load_tokenizer
from rlinf.errors import UserError
from rlinf.rewards.tasks import check_tasks
from rlinf.runners.halves import RolloutOnly, TrainOnly
from rlinf.runners.launch import WORKERS, launch_generation
from rlinf.runners.recorded import RecordedSteps, ranges
from rlinf.runners.requests import stop_of
from rlinf.runners.restarts import with_restarts
from rlinf.runners.resuming import TRAIN_ONLY
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.session import check_trackers, open_session, say
from rlinf.scheduling.placement import build_plan

JOURNAL_WORKER = "rlinf.workers.journal:JournalWorker"


def rollout_only(resolved: Resolved) -> int:
    """Generate and judge the steps with the start model; there is no actor, and no checkpoint."""
    if resolved.config.runner.resume_dir is not None:
        raise UserError(
            "--debug-rollout-only: there are no checkpoints to go on from; "
            "set rollout.model_dir to the hf folder of one, without runner.resume_dir"
        )
    config = replace(resolved.config, runner=replace(resolved.config.runner, save_interval=0))
    resolved = replace(resolved, config=config, provenance=resolved.provenance | {"runner.save_interval": "--debug-rollout-only"})
    check_trackers(config.runner.logger.logger_backends)
    folder = RunFolder(resolved)
    tokenizer = load_tokenizer(config.rollout.model_dir, config.rollout.trust_remote_code, config.data.chat_template_variables)
    prompts, report = load_prompts(config.data.train_data_paths, config.data, tokenizer)
    say(f"training data: {report.describe()}")
    check_tasks({p.task for p in prompts}, config.reward.own_tasks)
    sampler = PromptSampler(len(prompts), config.data.rollout_batch_size, config.data.shuffle, config.data.seed, report.fingerprint)
    with open_session(resolved, folder, tokenizer, report.fingerprint) as session:
        plan = build_plan(config, session.nodes)
        groups = launch_generation(session.cluster, plan, config)
        stop = stop_of(config.algorithm, tokenizer)
        loop = RolloutOnly(config, folder, session.cluster, prompts=prompts, sampler=sampler, stop=stop, **groups)
        session.complete(loop, list(groups.values()))
    return 0


def train_only(resolved: Resolved, source: Path, first: int = 1) -> int:
    """Train on the journalled groups of the run in `source`, step by step from `first` (after a resumption: from the step behind the
    checkpoint), behind hangs too; there are no engines."""
    return with_restarts(lambda again: train_only_once(again, source, first), resolved)


def train_only_once(resolved: Resolved, source: Path, first: int) -> int:
    config = resolved.config
    check_trackers(config.runner.logger.logger_backends)
    steps = RecordedSteps(source)
    folder = RunFolder(resolved, TRAIN_ONLY)
    first = folder.resume.step + 1 if folder.resume else first
    last = steps.total_steps(config.runner.max_epochs, config.runner.max_steps)
    missing = sorted({*range(first, last + 1)} - {*steps.steps})
    if missing or last < first:
        what = f"steps {ranges(missing)} are not journalled there" if missing else f"it has nothing behind step {first - 1}"
        raise UserError(f"{source}: {what}; there are steps {ranges(steps.steps)} (runner.keep_groups); set runner.max_steps")
    tokenizer = load_tokenizer(config.rollout.model_dir, config.rollout.trust_remote_code, config.data.chat_template_variables)
    with open_session(resolved, folder, tokenizer, "") as session:
        plan = build_plan(config, session.nodes)
        groups = {name: session.cluster.launch(plan, name, WORKERS[name], config) for name in config.megatron_roles}
        groups["reader"] = session.cluster.launch(plan, "reward", JOURNAL_WORKER, config)
        loop = TrainOnly(config, folder, session.cluster, steps=steps, first=first, **groups)
        session.complete(loop, list(groups.values()))
    return 0
