"""Stand-ins for workers that take and return the real payload types and compute nothing: what is left of a step is the driver's work.

Nothing here imports torch: 32 such processes fit on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlinf.data.packing import RankBatch
from rlinf.data.records import Finish, Group, GroupHeader, Prompt, Sample, Status, Verdict, sample_id
from rlinf.data.token_values import DumpPlan
from rlinf.rollout.contract import EngineStats, GenerateRequest
from rlinf.scheduling.placement import WorkerAddress
from rlinf.weights.routes import SHARED_MEMORY
from rlinf.weights.source import BucketSpec, Receipt, SharedMemory
from rlinf.workers.interfaces import TokenNumbers, TrainReport

LONGEST = 32_768  # tokens of a response


@dataclass(frozen=True)
class Light:
    """mean_tokens: of a response (log-normal). metrics: names that a train step reports. buckets: of the model's weights."""

    mean_tokens: int
    metrics: tuple[str, ...]
    buckets: tuple[BucketSpec, ...]


class LightActor:
    def __init__(self, address: WorkerAddress, light: Light) -> None:
        self.report = TrainReport(dict.fromkeys(light.metrics, 0.5), {"time/forward_backward": 1.0, "time/optimizer": 0.1}, 1 << 30)
        self.sources = {} if address.rank % 2 else {SHARED_MEMORY: SharedMemory(light.buckets)}  # TP 2: the first rank of two writes

    def train_step(self, step: int, dump: DumpPlan, batch: RankBatch, *payloads: Group) -> tuple[TrainReport, TokenNumbers]:
        if [g.group_id for g in payloads] != list(batch.group_ids):
            raise ValueError(f"step {step}: payloads do not match the plan")
        return self.report, {}

    def publish(self, version: int, transports: tuple[str, ...]) -> tuple[tuple[dict[str, SharedMemory], float], tuple[np.ndarray, ...]]:
        return ({t: self.sources[t] for t in transports if t in self.sources}, 0.1), ()

    def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros(len(s) - 1, np.float32) for s in sequences]

    def release(self, keep: bool = False) -> None:
        pass


class LightRollout:
    def __init__(self, address: WorkerAddress, light: Light) -> None:
        self.random, self.mean_tokens, self.version = np.random.default_rng(address.rank), light.mean_tokens, 0
        self.tokens = self.random.integers(0, 150_000, LONGEST, dtype=np.int32)  # every sample is a part of these
        self.logprobs, self.mask = np.full(LONGEST, -0.3, np.float32), np.ones(LONGEST, np.uint8)

    async def generate(self, request: GenerateRequest, prompt: Prompt, before: Group | None = None) -> tuple[GroupHeader, Group]:
        sigma = 0.8
        lengths = (
            np.exp(self.random.normal(np.log(self.mean_tokens) - sigma**2 / 2, sigma, request.n))
            .astype(int)
            .clip(1, min(request.max_new_tokens, LONGEST))
        )
        samples = tuple(
            Sample(
                sample_id(request.request_id, k),
                self.tokens[:n],
                self.logprobs[:n],
                self.mask[:n],
                ((self.version, int(n)),),
                Finish.STOP,
            )
            for k, n in enumerate(lengths)
        )
        group = Group(request.request_id, prompt, samples)
        return group.header(), group

    async def load_weights(self, source: SharedMemory, version: int, *stages: tuple[np.ndarray, ...]) -> tuple[Receipt, EngineStats]:
        self.version = version
        tensors, nbytes = sum(len(b.tensors) for b in source.buckets), sum(b.nbytes for b in source.buckets)
        return Receipt(version, {b.key: b.checksum for b in source.buckets}, tensors, nbytes, 0.1), EngineStats(decoded_tokens=1000)

    async def sequence_logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros(len(s) - 1, np.float32) for s in sequences]


class LightReward:
    def __init__(self, address: WorkerAddress) -> None:
        self.random = np.random.default_rng(address.rank)

    async def judge(self, group: Group, dump_path: str | None = None) -> tuple[Verdict, ...]:
        right = self.random.random(len(group.samples)) < 0.4
        return tuple(Verdict(5.0 if r else -5.0, Status.RIGHT if r else Status.WRONG, f"{k}", "number", 0.001) for k, r in enumerate(right))
