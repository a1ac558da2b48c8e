"""Real runs of a tiny random model that go wrong for a planted reason: the report's rules name it, and only it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlinf.config.load import load
from rlinf.data.records import Status
from rlinf.report.rules import Finding, find_problems
from rlinf.report.run_data import count_all, open_run
from rlinf.rewards.verifier import Verifier
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.runners.launch import train
from rlinf.weights.source import Receipt, SharedMemory
from tests.test_tiny_run import ONE_PROCESS, write_run


def findings(folder: Path, **settings: object) -> dict[str, Finding]:
    folder.mkdir()
    settings = {"runner__max_steps": 8, "runner__val_check_interval": 0, "runner__save_interval": 0, "rollout__verify_weights_every": 0, "algorithm__n_minibatches": 1} | settings
    assert train(load(str(write_run(folder, **ONE_PROCESS, **settings)))) == 0
    run = open_run(folder / "logs" / "tiny")
    for _ in count_all(run):
        pass
    return {finding.rule: finding for finding in find_problems(run)}


def rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are right by the parity of their length: something to learn for a model that knows nothing."""
    judge = Verifier.verify_many

    def verify_many(self: Verifier, items: list) -> list:
        odd = [len(item.text) % 2 for item in items]
        return [replace(v, reward=5.0 if o else -5.0, status=Status.RIGHT if o else Status.WRONG) for v, o in zip(judge(self, items), odd)]

    monkeypatch.setattr(Verifier, "verify_many", verify_many)


def test_weights_that_do_not_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewarded(monkeypatch)
    take = EmbeddedEngine._load

    def keep(self: EmbeddedEngine, source: SharedMemory, version: int) -> Receipt:
        """From version 2 on the engine takes the number alone."""
        if version < 2:
            return take(self, source, version)
        self._batcher.version = version
        sent = source.buckets
        return Receipt(version, {b.key: b.checksum for b in sent}, sum(len(b.tensors) for b in sent), sum(b.nbytes for b in sent), 0.0)

    sound = findings(tmp_path / "sound")
    assert "stale-weights" not in sound
    monkeypatch.setattr(EmbeddedEngine, "_load", keep)
    found = findings(tmp_path / "planted")
    assert "stale-weights" in found and set(found) - set(sound) == {"stale-weights"}
    assert "took the version's number" in found["stale-weights"].evidence[-1]
