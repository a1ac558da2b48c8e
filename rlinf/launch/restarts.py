"""What happens after a hang (runner.on_hang): the command ends, or the run is restarted from its latest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rlinf.config.load import Resolved
from rlinf.errors import Hang
from rlinf.launch.session import say
from rlinf.run_paths import RunPaths


def with_restarts(once: Callable[[Resolved], int], resolved: Resolved) -> int:
    """Return once(resolved). When that hangs and runner.on_hang is `restart`, call it again from the latest checkpoint, at most
    runner.max_restarts times."""
    restarts, runner = 0, resolved.config.runner
    while True:
        try:
            return once(resolved)
        except Hang as hang:
            if runner.on_hang != "restart" or restarts == runner.max_restarts or not RunPaths(runner.run_dir).latest.exists():
                raise
            restarts += 1
            say(f"rlinf: {hang}\nrlinf: restart {restarts} of at most {runner.max_restarts}, from the latest checkpoint")
            resolved = resuming(resolved)


def resuming(resolved: Resolved) -> Resolved:
    """The configuration with which the same run goes on from its latest checkpoint."""
    config = replace(resolved.config, runner=replace(resolved.config.runner, resume_dir="auto"))
    return replace(resolved, config=config, provenance=resolved.provenance | {"runner.resume_dir": "restart after a hang"})
