"""From a resolved configuration to a finished fine-tuning run: examples, machines, workers, the loop."""

from __future__ import annotations

import asyncio

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.processes import new_run_id, terminate_as_interrupt
from rlinf.cluster.usage import Usage
from rlinf.config.load import Resolved
from rlinf.data.examples import load_examples
from rlinf.data.records import Group
from rlinf.data.sampler import PromptSampler
from rlinf.data.tokenizer import load_tokenizer
from rlinf.runners.environment import record_environment
from rlinf.runners.launch import check_trackers, open_logger, say
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.sft import SftRunner
from rlinf.runners.status import Status
from rlinf.runners.watchdog import Watchdog
from rlinf.scheduling.placement import build_sft_plan

SFT_WORKER = "rlinf.workers.sft:SftWorker"


def finetune(resolved: Resolved) -> int:
    """Run to the end; 0 when it finished. Everything that was started is ended, however this returns."""
    config = resolved.config
    check_trackers(config.runner.logger.logger_backends)
    folder = RunFolder(resolved, "sft")
    tokenizer = load_tokenizer(config.rollout.model_dir, config.rollout.trust_remote_code)
    examples, report = load_examples(config.data.train_data_paths, config, tokenizer)
    say(f"training data: {report.describe()}")
    val_examples: list[Group] = []
    if config.data.val_data_paths:
        val_examples, val_report = load_examples(config.data.val_data_paths, config, tokenizer)
        say(f"held-out data: {val_report.describe()}")
    sampler = PromptSampler(len(examples), config.sft.batch_size, config.data.shuffle, config.data.seed, report.fingerprint, "sft.batch_size")
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
        actor = cluster.launch(build_sft_plan(config, nodes), "actor", SFT_WORKER, config)
        runner = SftRunner(config, folder, cluster, actor, examples, val_examples, sampler)
        watchdog = Watchdog(folder.path, run_id, config.runner, [actor], cluster.failure, dict)
        status = Status(folder.path, run_id, cluster, [actor], runner, watchdog)
        with usage.sampling(lambda: cluster.phase), status.writing():
            asyncio.run(cluster.guard(runner.run(logger)))
        folder.finish()
    finally:
        logger.close()
        cluster.close()
    say(usage.describe())
    if runner.val_losses:
        first, last = min(runner.val_losses), max(runner.val_losses)
        say(f"held-out loss: {runner.val_losses[first]:.4f} before step {first + 1}, {runner.val_losses[last]:.4f} after step {last}")
    if (folder.checkpoints / "latest").exists():
        say(f"model: {folder.checkpoints / 'latest' / 'hf'} (rollout.model_dir of a run that goes on from it)")
    return 0
