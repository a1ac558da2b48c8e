"""From a resolved configuration to a finished run: prompts, machines, workers, the loop, the table at the end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.processes import new_run_id, terminate_as_interrupt
from rlinf.cluster.usage import Usage
from rlinf.config.load import Resolved, value_of
from rlinf.config.model import own_functions
from rlinf.config.own_code import load_own
from rlinf.data.prompts import load_prompts
from rlinf.data.records import Prompt
from rlinf.data.sampler import PromptSampler
from rlinf.data.tokenizer import load_tokenizer
from rlinf.errors import UserError
from rlinf.metrics.logger import MetricLogger
from rlinf.metrics.summary import show_summary
from rlinf.metrics.trackers import missing_packages
from rlinf.rewards.tasks import check_tasks
from rlinf.runners.environment import record_environment
from rlinf.runners.reasoning import ReasoningRunner
from rlinf.runners.requests import stop_of
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.status import Status
from rlinf.runners.watchdog import Watchdog
from rlinf.scheduling.placement import build_plan

TRAIN_WORKER = "rlinf.workers.train:TrainWorker"
ROLLOUT_WORKER = "rlinf.workers.rollout:RolloutWorker"
CRITIC_WORKER = "rlinf.workers.critic:CriticWorker"
REWARD_WORKER = "rlinf.workers.reward:RewardWorker"


def train(resolved: Resolved) -> int:
    """Run to the end; 0 when it finished. Everything that was started is ended, however this returns."""
    config = resolved.config
    check_trackers(config.runner.logger.logger_backends)
    folder = RunFolder(resolved)
    tokenizer = load_tokenizer(config.rollout.model_dir, config.rollout.trust_remote_code)
    prompts, report = load_prompts(config.data.train_data_paths, config.data, tokenizer)
    say(f"training data: {report.describe()}")
    val_prompts: list[Prompt] = []
    if config.data.val_data_paths:
        val_prompts, val_report = load_prompts(config.data.val_data_paths, config.data, tokenizer)
        say(f"validation data: {val_report.describe()}")
    check_tasks({p.task for p in (*prompts, *val_prompts)}, config.reward.own_tasks)
    for _, function in own_functions(config):
        load_own(function)
    sampler = PromptSampler(len(prompts), config.data.rollout_batch_size, config.data.shuffle, config.data.seed, report.fingerprint)
    logger = open_logger(resolved, folder)
    run_id = new_run_id()
    say(f"run {run_id} in {folder.path}" + (f", goes on after step {folder.resume.step}" if folder.resume else ""))
    cluster = Cluster.connect(config.cluster, run_id, folder.path / "workers")
    terminate_as_interrupt()
    try:
        usage = Usage(run_id)
        nodes = cluster.inventory()
        first_step = (folder.resume.step if folder.resume else 0) + 1
        record_environment(folder.path, run_id, first_step, nodes, tokenizer, config.rollout.model_dir, report.fingerprint)
        plan = build_plan(config, nodes)
        groups = [
            cluster.launch(plan, component, worker, config)
            for component, worker in (("actor", TRAIN_WORKER), ("rollout", ROLLOUT_WORKER), ("reward", REWARD_WORKER))
        ]
        critic = cluster.launch(plan, "critic", CRITIC_WORKER, config) if config.has_critic else None
        runner = ReasoningRunner(config, folder, cluster, *groups, prompts, val_prompts, sampler, stop_of(config.algorithm, tokenizer), critic)
        groups += [critic] if critic else []
        watchdog = Watchdog(folder.path, run_id, config.runner, groups, cluster.failure, lambda: dict(runner.in_flight))
        status = Status(folder.path, run_id, cluster, groups, runner, watchdog)
        with usage.sampling(lambda: cluster.phase), status.writing():
            asyncio.run(cluster.guard(runner.run(logger)))
        folder.finish()
    finally:
        logger.close()
        cluster.close()
    say(usage.describe())
    if len(runner.scores) > 1:
        first, last = min(runner.scores), max(runner.scores)
        show_summary(runner.scores[first].as_scores(), runner.scores[last].as_scores(), config.runner.output_dir)
    return 0


def check_trackers(backends: Sequence[str]) -> None:
    missing = missing_packages(backends)
    if missing:
        raise UserError(f"runner.logger.logger_backends: {', '.join(missing)} is not installed here; pip install {' '.join(missing)}, or leave it out")


def open_logger(resolved: Resolved, folder: RunFolder) -> MetricLogger:
    logger, settings = resolved.config.runner.logger, {name: value_of(resolved.config, name) for name in resolved.provenance}
    return MetricLogger(folder.path, logger.logger_backends, folder.resume_step, logger.project_name, settings)


def say(line: str) -> None:
    """One line to the screen of the driver."""
    sys.stderr.write(line + "\n")
