"""From a resolved configuration to a finished fine-tuning run: examples, machines, workers, the loop."""

from __future__ import annotations

from rlinf.config.load import Resolved
from rlinf.data.examples import load_examples, repeated
from rlinf.data.records import Group
from rlinf.data.sampler import PromptSampler
from rlinf.data.tokenizer import load_tokenizer
from rlinf.runners.restarts import with_restarts
from rlinf.runners.resuming import SFT
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.session import check_trackers, is_done, open_session, say
from rlinf.runners.sft import SftRunner
from rlinf.scheduling.placement import build_sft_plan

SFT_WORKER = "rlinf.workers.sft:SftWorker"


def finetune(resolved: Resolved) -> int:
    """Run to the end, behind hangs too; 0 when it finished. Everything that was started is ended, however this returns."""
    return with_restarts(finetune_once, resolved)


def finetune_once(resolved: Resolved) -> int:
    config = resolved.config
    check_trackers(config.runner.logger.logger_backends)
    folder = RunFolder(resolved, SFT)
    tokenizer = load_tokenizer(config.rollout.model_dir, config.rollout.trust_remote_code, config.data.chat_template_variables)
    examples, report = load_examples(config.data.train_data_paths, config, tokenizer)
    say(f"training data: {report.describe()}")
    val_examples: list[Group] = []
    if config.data.val_data_paths:
        val_examples, val_report = load_examples(config.data.val_data_paths, config, tokenizer)
        say(f"held-out data: {val_report.describe()}")
        if warning := repeated(examples, val_examples):
            say(warning)
    sampler = PromptSampler(
        len(examples), config.sft.batch_size, config.data.shuffle, config.data.seed, report.fingerprint, "sft.batch_size"
    )
    if is_done(folder, sampler):
        return 0
    with open_session(resolved, folder, tokenizer, report.fingerprint) as session:
        actor = session.cluster.launch(build_sft_plan(config, session.nodes), "actor", SFT_WORKER, config)
        runner = SftRunner(config, folder, session.cluster, actor, examples, val_examples, sampler)
        session.complete(runner, [actor])
    if runner.val_losses:
        first, last = min(runner.val_losses), max(runner.val_losses)
        say(f"held-out loss: {runner.val_losses[first]:.4f} before step {first + 1}, {runner.val_losses[last]:.4f} after step {last}")
    if (folder.checkpoints / "latest").exists():
        say(f"model: {folder.checkpoints / 'latest' / 'hf'} (rollout.model_dir of a run that goes on from it)")
    return 0
