"""The rollout worker beside its engine: what the engine is asked, and in which order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlinf.config.schema import Config
from rlinf.scheduling.placement import WorkerAddress
from rlinf.weights.source import Disk, Receipt
from rlinf.workers.rollout import RolloutWorker
from tests.tiny import make_tiny_model


def test_weights_are_loaded_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is started anew in the middle of a sync is given the same version by both."""
    config, turns = Config(), []
    config.rollout.model_dir, config.rollout.rollout_backend = str(make_tiny_model(tmp_path / "model", layers=1)), "embedded"
    config.cluster.device, config.cluster.backend = "cpu", "local"
    worker = RolloutWorker(WorkerAddress("rollout", 0, 1, 0, (0,), "127.0.0.1", 0, "run", 1), config)

    async def load(source: Any, version: int) -> Receipt:
        turns.append("begins")
        await asyncio.sleep(0.01)
        turns.append("ends")
        return Receipt(version, {}, 0, 0, 0.0)

    async def twice() -> list[Any]:
        return await asyncio.gather(*(worker.load_weights(Disk("nowhere"), 3) for _ in range(2)))

    monkeypatch.setattr(worker.engine, "load_weights", load)
    assert [receipt.version for receipt, _ in asyncio.run(twice())] == [3, 3] and turns == ["begins", "ends"] * 2
    worker.close()
