"""The methods that runners may call on worker groups, as protocols. The implementations, in the modules beside this one, are plain classes
without Ray; rlinf.cluster decides in which processes they live.

Under Ray every method is a remote call. A step may make at most 3 calls for each group of samples, and 3 for each rank.
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
    """What a rank reports after a train step. metrics are the same on all ranks; the other fields are this rank's own.

    timers: seconds by part of the step. memory_bytes: peak. checkpoint_written: whether this rank's files of the checkpoint that is written
    in the background are on disk.
    flops: floating-point operations of the model by part of the step, and as `again` those that activation recompute adds.
    peak_flops: operations per second in the device's data sheet; 0 = not known.
    scores: only of a token reward model, on the first tensor-parallel rank of the last stage: sample id -> score of the response.
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
    """TokenNumbers that are rewards: a type of its own, so that the actor can tell them from a critic's values."""


class InCheckpoints(Protocol):
    """One rank of a role whose state is in checkpoints."""

    def save(self, step_dir: str) -> None:
        """Write this role's part of a checkpoint; with runner.async_checkpoint begin to write it, which finish_save() completes."""
        ...

    def finish_save(self) -> None:
        """Complete what save() began: wait for the files, check them."""
        ...

    def load(self, step_dir: str) -> None: ...


class OnSharedDevices(Protocol):
    """One rank of a role that may share its device with an engine."""

    def hand_over(self) -> None:
        """Free the device for those that share it; the runner calls it before engines start there."""
        ...


class ActorWorker(InCheckpoints, OnSharedDevices, Protocol):
    """One rank of the actor."""

    def train_step(self, step: int, dump: DumpPlan, batch: RankBatch, *payloads: Group | TokenNumbers) -> tuple[TrainReport, TokenNumbers]:
        """All optimizer steps of one global batch; none while the critic warms up (critic.warmup_steps).

        payloads: the groups named by batch.group_ids, in that order; then, with a critic, what the ranks that have any of these groups
        returned from values(), and with a token reward model what such ranks returned from scores().
        dump: the file to which values of each token are appended.
        The second result is empty, except with a critic on the first tensor-parallel rank of the last stage: there it has the targets of
        the values of this rank's samples.
        """
        ...

    def publish(self, version: int, transports: tuple[str, ...]) -> tuple[tuple[dict[str, Buckets], float], tuple[np.ndarray, ...]]:
        """Gather the weights of `version` and hand them out by each transport (weights.routes).

        Returns ((what was written by transport, the seconds it took), the arrays that go to other nodes). A rank without a transport feeds
        no engine: publish() and release() are called on it for the first version only.
        """
        ...

    def open_store(self) -> tuple[str, int]:
        """Start the store at which the members of broadcast groups meet. Returns its host and port."""
        ...

    def join(self, store: tuple[str, int], groups: Sequence[BroadcastGroup]) -> None:
        """Join the broadcast group of this publisher; returns when all its members have joined."""
        ...

    def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The actor's log-probabilities, to be compared with those of an engine; as rollout.contract.RolloutEngine.sequence_logprobs()."""
        ...

    def release(self, keep: bool = False) -> None:
        """Called when the engines have the weights: free a shared device (actor.offload_*), and remove what the last publish() wrote; with
        `keep` that stays readable until the next version."""
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
    """One rank of the critic. It is called twice a step; in between the actor computes advantages and targets."""

    def values(self, batch: RankBatch, *groups: Group) -> tuple[TrainReport, TokenNumbers]:
        """The value of the state before each token, on the first tensor-parallel rank of the last stage; on other ranks an empty dict."""
        ...

    def train_step(self, step: int, *targets: TokenNumbers) -> TrainReport:
        """All optimizer steps on the batch of the last values(). targets: what the actor's ranks that have any of its groups returned."""
        ...


class TokenRewardWorker(OnSharedDevices, Protocol):
    """One rank of the token reward model, which is frozen."""

    def scores(self, batch: RankBatch, *groups: Group) -> tuple[TrainReport, TokenRewards]:
        """A score for each response, in the report; with algorithm.dense_rewards also a reward for each token."""
        ...


class RolloutWorker(Protocol):
    """One rollout engine."""

    async def generate(self, request: GenerateRequest, prompt: Prompt, before: Group | None = None) -> tuple[GroupHeader, Group]:
        """The group of a prompt. before: the group as it was when it was aborted, to be continued."""
        ...

    async def abort(self) -> None:
        """End every running generate() with the tokens that it has; incomplete samples have the finish ABORT."""
        ...

    async def load_weights(
        self, source: WeightSource | Collective, version: int, *stages: tuple[np.ndarray, ...]
    ) -> tuple[Receipt, EngineStats]:
        """Load the weights that `source` describes. stages: when they come from another node, the arrays of each pipeline stage.

        Also returns what stats() would return, so that a step needs no extra call for it.
        """
        ...

    async def join(self, store: tuple[str, int], groups: Sequence[BroadcastGroup]) -> None:
        """Join the broadcast groups of this engine, in their order; returns when all their members have joined."""
        ...

    async def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]: ...

    async def sleep(self, tags: Sequence[str]) -> None:
        """Free memory while the actor has the device. tags: `kv`, `weights`."""
        ...

    async def stats(self) -> EngineStats: ...

    async def start_trace(self, step: int) -> None:
        """Start torch's profiler for the engine, on the ranks of runner.profile_ranks."""
        ...

    async def stop_trace(self) -> None:
        """Write what was recorded, if anything was, to profile/ in the run's folder."""
        ...


class RewardWorker(Protocol):
    """One process that judges groups, and writes them to files."""

    async def judge(self, group: Group, dump_path: str | None = None) -> tuple[Verdict, ...]:
        """Verdicts in the order of the samples.

        With dump_path, also appends one JSON line a sample (prompt, response, verdict, versions), and the group to its step's journal.
        """
        ...

    def keep(self, path: str, group: Group, verdicts: tuple[Verdict | None, ...]) -> None:
        """Write the group to a file of a checkpoint."""
        ...

    def fetch(self, path: str, dump_path: str | None = None) -> tuple[GroupHeader, Group]:
        """The group that keep() wrote. With dump_path, its samples and journal are also written as by judge()."""
        ...


class JournalWorker(Protocol):
    """One process that reads groups which an earlier run generated and judged."""

    def fetch(self, files: Sequence[str], group_id: str) -> tuple[GroupHeader, Group]:
        """A group, from the first of `files` that has it. Each group can be fetched only once."""
        ...
