"""What every run opens and closes: its folder, the screen, the loggers, the cluster, the one who watches."""

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
from rlinf.metrics.logger import MetricLogger
from rlinf.metrics.trackers import missing_packages
from rlinf.runners.disk import told_when_full
from rlinf.runners.environment import changed_settings, record_environment
from rlinf.runners.monitor import Monitor
from rlinf.runners.resuming import refuse_other_model
from rlinf.runners.run_folder import RunFolder
from rlinf.runners.status import Status
from rlinf.runners.training_loop import TrainingLoop
from rlinf.runners.watchdog import Watchdog


class Session:
    """A run that has its machines. nodes: what they have."""

    def __init__(self, resolved: Resolved, folder: RunFolder, logger: MetricLogger, cluster: Cluster, run_id: str) -> None:
        self.config, self.folder, self.logger, self.cluster, self.run_id = resolved.config, folder, logger, cluster, run_id
        self.usage, self.nodes = Usage(run_id), cluster.inventory()

    def complete(self, loop: TrainingLoop, groups: Sequence[WorkerGroup]) -> None:
        """Run the loop to its end, watched."""
        watchdog = Watchdog(self.folder.path, self.run_id, self.config.runner, groups, self.cluster.failure, lambda: dict(loop.in_flight))
        monitor = Monitor(self.cluster, loop, watchdog, Status(self.folder.path, self.run_id, self.cluster, groups, loop))
        with self.usage.sampling(lambda: self.cluster.phase), monitor.watching(), told_when_full(self.folder.path):
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
    """Everything that was started is ended, however the block is left."""
    config, runner = resolved.config, resolved.config.runner
    settings = {name: value_of(config, name) for name in resolved.provenance}
    if folder.resume is not None:
        refuse_other_model(folder.resume.step_dir, folder.command, config)
    with ExitStack() as ends:  # in reverse order, each whatever the others raise
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
    """Whether a run that goes on has nothing to do; then it says so, and the folder is released."""
    if folder.resume is None or not folder.nothing_left(sampler):
        return False
    say(f"{folder.path}: all {folder.resume.step} steps are made; to train further raise runner.max_steps or runner.max_epochs")
    folder.release()
    return True


def check_trackers(backends: Sequence[str]) -> None:
    missing = missing_packages(backends)
    if missing:
        raise UserError(
            f"runner.logger.logger_backends: {', '.join(missing)} is not installed here; pip install {' '.join(missing)}, or leave it out"
        )


def say(line: str) -> None:
    """One line to the screen of the driver."""
    sys.stderr.write(line + "\n")
