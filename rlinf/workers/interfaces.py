"""What the runner may call on a worker group. Implementations are plain classes; the cluster room decides where they live.

Every method is one remote call under Ray. Budget: at most 3 calls a group and 3 a rank per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rlinf.data.records import Group, GroupHeader, Prompt, Verdict
from rlinf.data.token_values import DumpPlan
from rlinf.rollout.contract import EngineStats, GenerateRequest
from rlinf.data.packing import RankBatch
from rlinf.weights.source import Receipt, SharedMemory


@dataclass(frozen=True)
class TrainReport:
    """Metrics of one train step on one rank: equal on all ranks; and of this rank what the driver may log, and whether the files of the
    checkpoint that it writes in the background are on disk."""

    metrics: dict[str, float]
    timers: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    checkpoint_written: bool = False


class TrainWorker(Protocol):
    """One rank of a Megatron role."""

    def train_step(self, step: int, dump: DumpPlan, batch: RankBatch, *groups: Group) -> TrainReport:
        """All optimizer steps of one global batch. `groups` are the payloads named by batch.group_ids, in that order. What training saw
        of each token is appended to the file of `dump`."""
        ...

    def publish(self, version: int, transports: tuple[str, ...]) -> tuple[tuple[dict[str, SharedMemory], float], tuple[np.ndarray, ...]]:
        """Gather the weights as `version` and hand them out by each transport (weights.routes). Two results: what was written, by
        transport, with the seconds it took; and the arrays that go to other nodes."""
        ...

    def score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        """The trainer's side of a receipt: log-probability of each token given those before it (rollout.contract.RolloutEngine.score)."""
        ...

    def release(self) -> None:
        """The engines have the weights: free what the last publish() wrote and hand a shared device over (actor.offload_*)."""
        ...

    def save(self, step_dir: str) -> None:
        """Write this role's part of a checkpoint; with runner.async_checkpoint only begin to, until finish_save()."""
        ...

    def finish_save(self) -> None:
        """Complete what save() began: wait for the files, check them."""
        ...

    def load(self, step_dir: str) -> None: ...


class SftWorker(Protocol):
    """One rank of supervised fine-tuning."""

    def train_step(self, step: int, batch: RankBatch, *groups: Group) -> TrainReport:
        """One optimizer step on one global batch. `groups` are the examples named by batch.group_ids, in that order."""
        ...

    def validate(self, batch: RankBatch, *groups: Group) -> dict[str, float]:
        """Means over the held-out examples of all ranks."""
        ...

    def save(self, step_dir: str) -> None: ...

    def finish_save(self) -> None: ...

    def load(self, step_dir: str) -> None: ...


class RolloutWorker(Protocol):
    async def generate(self, request: GenerateRequest, prompt: Prompt) -> tuple[GroupHeader, Group]: ...

    async def load_weights(self, source: SharedMemory, version: int, *stages: tuple[np.ndarray, ...]) -> Receipt:
        """Take the weights of `source`; what came from another node is in `stages`, the arrays of each pipeline stage."""
        ...

    async def score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]: ...

    async def stats(self) -> EngineStats: ...


class RewardWorker(Protocol):
    async def judge(self, group: Group, dump_path: str | None) -> tuple[Verdict, ...]:
        """Verdicts in the order of the samples; with dump_path, also appends one JSON line a sample (prompt, response, verdict, versions)."""
        ...
