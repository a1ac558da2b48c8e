"""Windows of torch's profiler: a trace file for a rank and a step, to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from rlinf.config.schema import RunnerConfig
from rlinf.device import recorder


@contextmanager
def profiled(runner: RunnerConfig, step: int, component: str) -> Iterator[None]:
    """Record the block on this rank when runner.profile_steps and runner.profile_ranks name it.

    It is written to profile/step_000003-actor-0.json.gz in the run's folder.
    """
    rank = dist.get_rank()
    if step not in runner.profile_steps or rank not in runner.profile_ranks:
        yield
        return
    folder = runner.run_dir / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    with recorder() as recorded:
        yield
    recorded.export_chrome_trace(str(folder / f"step_{step:06d}-{component}-{rank}.json.gz"))
