"""What every run opens at its start and closes at its end: run folder, loggers, cluster, monitor."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.group import WorkerGroup
from rlinf.cluster.processes import new_run_id, terminate_as_interrupt
from rlinf.cluster.usage import Usage
from rlinf.config.load import Resolved, value_of
from rlinf.config.model import own_functions
from rlinf.data.sampler import PromptSampler
from rlinf.data.tokenizer import TextTokenizer
from rlinf.errors import UserError
from rlinf.launch.disk import explain_full_disk
from rlinf.launch.environment import changed_settings, record_environment
from rlinf.launch.monitor import Monitor
from rlinf.launch.status import Status
from rlinf.launch.watchdog import Watchdog
from rlinf.metrics.logger import MetricLogger
from rlinf.metrics.trackers import missing_packages
from rlinf.run_folder.folder import RunFolder
from rlinf.run_folder.resuming import refuse_other_model
from rlinf.runners.training_loop import TrainingLoop


class Session:
    """A run whose folder, loggers and cluster are open. nodes: the machines of the cluster."""

    def __init__(self, resolved: Resolved, folder: RunFolder, logger: MetricLogger, cluster: Cluster, run_id: str) -> None:
        self.config, self.folder, self.logger, self.cluster, self.run_id = resolved.config, folder, logger, cluster, run_id
        self.usage, self.nodes = Usage(run_id), cluster.inventory()

    def complete(self, loop: TrainingLoop, groups: Sequence[WorkerGroup]) -> None:
        """Run the loop to its end, under the eyes of watchdog and status, and mark the folder as finished."""
        watchdog = Watchdog(self.folder.path, self.run_id, self.config.runner, groups, self.cluster.failure, lambda: dict(loop.in_flight))
        monitor = Monitor(self.cluster, loop, watchdog, Status(self.folder.path, self.run_id, self.cluster, groups, loop))
        with self.usage.sampling(lambda: self.cluster.phase), monitor.watching(), explain_full_disk(self.folder.path):
            asyncio.run(self._watched(loop, watchdog))
        self.folder.finish()

    async def _watched(self, loop: TrainingLoop, watchdog: Watchdog) -> None:
        listening = asyncio.create_task(watchdog.listen())
        try:
            await self.cluster.guard(loop.run(self.logger))
        finally:
            listening.cancel()


@contextmanager
def open_session(resolved: Resolved, folder: RunFolder, tokenizer: TextTokenizer, data_fingerprint: str) -> Iterator[Session]:
    """Open all that a run needs. Everything that was started is ended when the block is left, however that happens."""
    config, runner = resolved.config, resolved.config.runner
    settings = {name: value_of(config, name) for name in resolved.provenance}
    if folder.resume is not None:
        refuse_other_model(folder.resume.step_dir, folder.command, config)
    with ExitStack() as ends:  # run in reverse order, each even when another raises
        ends.callback(folder.release)
        folder.begin()
        logger = MetricLogger(folder.path, runner.logger.logger_backends, folder.resume_step, runner.logger.project_name, settings)
        run_id = new_run_id()
        say(f"run {run_id} in {folder.path}" + (f", goes on after step {folder.resume.step}" if folder.resume else ""))
        source = folder.resume.step_dir.parent.parent if folder.resume else folder.path  # another run's, where this one is a branch of it
        for change in changed_settings(source, settings):
            say(f"  {change}")
        terminate_as_interrupt()
        cluster = Cluster.connect(config.cluster, run_id, folder.path / "workers")
        ends.callback(cluster.close)
        ends.callback(logger.close)
        session = Session(resolved, folder, logger, cluster, run_id)
        first_step = (folder.resume.step if folder.resume else 0) + 1
        model, own = config.rollout.model_dir, own_functions(config)
        record_environment(folder.path, run_id, first_step, session.nodes, tokenizer, model, data_fingerprint, own, settings)
        yield session
    say(session.usage.describe())


def is_done(folder: RunFolder, sampler: PromptSampler) -> bool:
    """Whether a resumed run has no step left to make. If so, says it and releases the folder."""
    if folder.resume is None or not folder.nothing_left(sampler):
        return False
    say(f"{folder.path}: all {folder.resume.step} steps are made; to train further raise runner.max_steps or runner.max_epochs")
    folder.release()
    return True


def check_trackers(backends: Sequence[str]) -> None:
    """Raise UserError when the package of a logger backend is not installed."""
    missing = missing_packages(backends)
    if missing:
        raise UserError(
            f"runner.logger.logger_backends: {', '.join(missing)} is not installed here; pip install {' '.join(missing)}, or leave it out"
        )


def tell_best(folder: RunFolder) -> None:
    """Say where the checkpoint with the best held-out score is, where that is not the newest one."""
    best = folder.checkpoints.best()
    if best is not None and best != folder.paths.complete_checkpoints()[-1]:
        say(f"best on held-out data: the checkpoint of step {best}, {folder.paths.best}")


def say(line: str) -> None:
    """Print one line to the driver's stderr."""
    sys.stderr.write(line + "\n")
