"""What the runner may call on a worker group. Implementations are plain classes; the cluster room decides where they live.

Every method is one remote call under Ray. Budget: at most 3 calls a group and 3 a rank per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rlinf.data.packing import RankBatch
from rlinf.data.records import Group, GroupHeader, Prompt, Verdict
from rlinf.data.token_values import DumpPlan
from rlinf.rollout.contract import EngineStats, GenerateRequest
from rlinf.weights.routes import BroadcastGroup
from rlinf.weights.source import Buckets, Collective, Receipt, WeightSource


@dataclass(frozen=True)
class TrainReport:
    """Metrics of one train step on one rank: equal on all ranks; and of this rank what the driver may log, and whether the files of the
    checkpoint that it writes in the background are on disk.

    flops: operations of this rank by part of the step, as the model asks for them, and under `again` what activation recompute adds.
    peak_flops: operations a second that the device's data sheet promises; 0 = not known.
    scores: of a token reward model, on the first tensor-parallel rank of the last stage: sample id -> the score of that response.
    """

    metrics: dict[str, float]
    timers: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    checkpoint_written: bool = False
    flops: dict[str, float] = field(default_factory=dict)
    peak_flops: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)


TokenNumbers = Mapping[str, np.ndarray]  # sample id -> one number for each of its tokens, [T] float32: a payload, never read by the driver


class TokenRewards(dict[str, np.ndarray]):
    """TokenNumbers that tokens are paid: a type of its own, so that the actor tells them from a critic's values."""


class InCheckpoints(Protocol):
    """One rank of what a checkpoint is made of."""

    def save(self, step_dir: str) -> None:
        """Write this role's part of a checkpoint; with runner.async_checkpoint only begin to, until finish_save()."""
        ...

    def finish_save(self) -> None:
        """Complete what save() began: wait for the files, check them."""
        ...

    def load(self, step_dir: str) -> None: ...


class OnSharedDevices(Protocol):
    """One rank of what may share its device with an engine."""

    def hand_over(self) -> None:
        """Leave the device to those that share it; the runner asks for it before engines start there."""
        ...


class TrainWorker(InCheckpoints, OnSharedDevices, Protocol):
    """One rank of the actor."""

    def train_step(self, step: int, dump: DumpPlan, batch: RankBatch, *payloads: Group | TokenNumbers) -> tuple[TrainReport, TokenNumbers]:
        """All optimizer steps of one global batch; none while the critic warms up (critic.warmup_steps).

        payloads: the groups named by batch.group_ids, in that order, then what the critic's ranks that hold any of them
        returned from values(), and the token reward model's from scores(). What training saw of each token is appended to the
        file of `dump`. The second result, of the first tensor-parallel rank of the last stage: with a critic the targets of the
        values of this rank's samples, else nothing.
        """
        ...

    def publish(self, version: int, transports: tuple[str, ...]) -> tuple[tuple[dict[str, Buckets], float], tuple[np.ndarray, ...]]:
        """Gather the weights as `version` and hand them out by each transport (weights.routes). Two results: what was written, by
        transport, with the seconds it took; and the arrays that go to other nodes. A rank with no transport is called for the first
        version only, release() too."""
        ...

    def open_store(self) -> tuple[str, int]:
        """Keep the store at which the members of broadcast groups meet; its host and port."""
        ...

    def join(self, store: tuple[str, int], groups: Sequence[BroadcastGroup]) -> None:
        """Make the broadcast group of this publisher, and return when all its members have."""
        ...

    def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The trainer's side of a receipt, as rollout.contract.RolloutEngine.sequence_logprobs()."""
        ...

    def release(self, keep: bool = False) -> None:
        """The engines have the weights: hand a shared device over (actor.offload_*) and withdraw what the last publish() wrote,
        or with `keep` leave that until the weights are out of use."""
        ...


class SftWorker(InCheckpoints, Protocol):
    """One rank of supervised fine-tuning."""

    def train_step(self, step: int, batch: RankBatch, *groups: Group) -> TrainReport:
        """One optimizer step on one global batch. `groups` are the examples named by batch.group_ids, in that order."""
        ...

    def validate(self, batch: RankBatch, *groups: Group) -> dict[str, float]:
        """Means over the held-out examples of all ranks."""
        ...


class CriticWorker(InCheckpoints, OnSharedDevices, Protocol):
    """One rank of the critic. Two calls a step: the actor finishes the advantages in between."""

    def values(self, step: int, batch: RankBatch, *groups: Group) -> tuple[TrainReport, TokenNumbers]:
        """The value of the state before each token, of the first tensor-parallel rank of the last stage; nothing of others."""
        ...

    def train_step(self, step: int, *targets: TokenNumbers) -> TrainReport:
        """All optimizer steps on the batch of the last values(). targets: what the actor's ranks that hold any of its groups returned."""
        ...


class TokenRewardWorker(OnSharedDevices, Protocol):
    """One rank of the token reward model, which is frozen."""

    def scores(self, step: int, batch: RankBatch, *groups: Group) -> tuple[TrainReport, TokenRewards]:
        """A score for each response, in the report; with algorithm.dense_rewards also what each token is paid."""
        ...


class RolloutWorker(Protocol):
    """One engine."""

    async def generate(self, request: GenerateRequest, prompt: Prompt, before: Group | None = None) -> tuple[GroupHeader, Group]:
        """The group of a prompt; of one that an engine let go of (`before`), the rest."""
        ...

    async def abort(self) -> None:
        """End every running generate() with what it has; the finish of what is not complete is ABORT."""
        ...

    async def load_weights(
        self, source: WeightSource | Collective, version: int, *stages: tuple[np.ndarray, ...]
    ) -> tuple[Receipt, EngineStats]:
        """Take the weights of `source`; what came from another node is in `stages`, the arrays of each pipeline stage.

        Also returns what stats() would say then, so that a step needs no call for it.
        """
        ...

    async def join(self, store: tuple[str, int], groups: Sequence[BroadcastGroup]) -> None:
        """Make the broadcast groups of this engine, in their order, and return when all their members have."""
        ...

    async def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]: ...

    async def sleep(self, tags: Sequence[str]) -> None:
        """Give memory back while the actor has the device; tags of `kv`, `weights`."""
        ...

    async def stats(self) -> EngineStats: ...

    async def start_trace(self, step: int) -> None:
        """Have torch's profiler record the engine, on the ranks of runner.profile_ranks."""
        ...

    async def stop_trace(self) -> None:
        """Write what was recorded, if anything, to profile/ of the run's folder."""
        ...


class RewardWorker(Protocol):
    """One process that judges."""

    async def judge(self, group: Group, dump_path: str | None = None) -> tuple[Verdict, ...]:
        """Verdicts in the order of the samples.

        With dump_path, also appends one JSON line a sample (prompt, response, verdict, versions), and the group to its step's journal.
        """
        ...

    def keep(self, path: str, group: Group, verdicts: tuple[Verdict | None, ...]) -> None:
        """Write the group to a file of a checkpoint."""
        ...

    def fetch(self, path: str, dump_path: str | None = None) -> tuple[GroupHeader, Group]:
        """What keep() wrote. With dump_path it is written there as judge() would have."""
        ...


class JournalWorker(Protocol):
    """One process that reads the groups of an earlier run, in place of engines and verdicts."""

    def fetch(self, files: Sequence[str], group_id: str) -> tuple[GroupHeader, Group]:
        """A group, from the first of `files` that has it; each can be asked for once."""
        ...
