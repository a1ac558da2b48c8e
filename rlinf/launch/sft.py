"""`rlinf sft`: from a resolved configuration to a finished fine-tuning run. Reads examples, starts the workers, runs the loop."""

from __future__ import annotations

from rlinf.config.load import Resolved
from rlinf.launch.prepare import EXAMPLES, prepare
from rlinf.launch.restarts import with_restarts
from rlinf.launch.session import is_done, open_session, say, tell_best
from rlinf.run_folder.resuming import SFT
from rlinf.runners.sft import SftRunner
from rlinf.scheduling.placement import build_sft_plan

SFT_WORKER = "rlinf.workers.sft:SftWorker"


def finetune(resolved: Resolved) -> int:
    """Run to the end and return 0; after a hang, restart as runner.on_hang says. Whatever was started is ended, however this returns."""
    return with_restarts(finetune_once, resolved)


def finetune_once(resolved: Resolved) -> int:
    config, run = resolved.config, prepare(resolved, SFT, EXAMPLES)
    if is_done(run.folder, run.sampler):
        return 0
    with open_session(resolved, run.folder, run.tokenizer, run.sampler.fingerprint) as session:
        actor = session.cluster.launch(build_sft_plan(config, session.nodes), "actor", SFT_WORKER, config)
        runner = SftRunner(config, run.folder, session.cluster, actor, run.training, run.held_out, run.sampler)
        session.complete(runner, [actor])
    if runner.val_losses:
        first, last = min(runner.val_losses), max(runner.val_losses)
        say(f"held-out loss: {runner.val_losses[first]:.4f} before step {first + 1}, {runner.val_losses[last]:.4f} after step {last}")
    if run.folder.paths.latest.exists():
        say(f"model: {run.folder.paths.latest / 'hf'} (rollout.model_dir of a run that goes on from it)")
    tell_best(run.folder)
    return 0
