"""Workers that hang once, where a test has left a mark: in a step of the actor, in one of its ranks; in a verdict."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlinf.config.schema import Config
from rlinf.data.records import Group, Verdict
from rlinf.scheduling.placement import WorkerAddress
from rlinf.workers.actor import ActorWorker
from rlinf.workers.reward import RewardWorker

HANG = 200.0  # seconds


def hang_once(config: Config, component: str) -> None:
    mark = Path(config.runner.output_dir) / f"hang-{component}"
    if mark.exists():
        mark.unlink()
        time.sleep(HANG)


class HangingActor(ActorWorker):
    def train_step(self, step: int, *args: Any) -> Any:
        if step == 2 and self.address.rank == 1:
            hang_once(self.config, "actor")
        return super().train_step(step, *args)


class HangingReward(RewardWorker):
    def __init__(self, address: WorkerAddress, config: Config) -> None:
        super().__init__(address, config)
        self.config = config

    def _judge(self, group: Group, dump_path: str | None) -> tuple[Verdict, ...]:
        hang_once(self.config, "reward")
        return super()._judge(group, dump_path)
