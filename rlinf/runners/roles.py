"""A step's batch over the ranks of the roles that train on it, and the numbers that go from one role's ranks to another's.

Actor and critic have layouts of their own: a sample's values are made on one rank and needed on another. They travel as payloads beside
the groups, from the rank that has them to those that ask; the driver sees references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from rlinf.cluster.group import Ref, Shared, WorkerGroup
from rlinf.config.model import planned_model_config
from rlinf.config.schema import ActorModelConfig, Config
from rlinf.data.packing import ATTENTION_LENGTH, RankBatch, attention_length, build_rank_batches
from rlinf.data.records import GroupHeader
from rlinf.scheduling.placement import publishers
from rlinf.workers.interfaces import TrainReport

PARTS = {
    "forward_backward": "",
    "critic_update": "",
    "recompute_logprobs": "_recompute",
    "values": "_values",
    "token_rewards": "",
}  # by timer: name in metrics
TRAINS = ("forward_backward", "critic_update")


class Part(NamedTuple):
    """Numbers of the samples of one data-parallel rank's share."""

    share: RankBatch
    numbers: Ref


class Role:
    """The ranks of actor, critic or token reward model. Rank order: TP fastest, then CP, then DP, then PP."""

    def __init__(self, group: WorkerGroup, model: ActorModelConfig) -> None:
        self.group = group
        self.dp = model.data_parallel_size(group.size)
        self.share_of = [model.data_parallel_rank(rank, group.size) for rank in range(group.size)]
        self.answering = [stages[-1] for stages in publishers(model, group.size)]  # the rank with the numbers of each share

    def split(
        self, config: Config, step: int, headers: Sequence[GroupHeader], advantages: Sequence[np.ndarray], trained: Sequence[np.ndarray]
    ) -> list[RankBatch]:
        """The share of every data-parallel rank; the mini-batches are the same for every role."""
        a = config.algorithm
        return build_rank_batches(
            headers, advantages, dp=self.dp, n_minibatches=a.n_minibatches, max_tokens=config.runner.max_tokens_per_mbs, share_prefix=True,
            shuffle_seed=(config.data.seed, step) if a.shuffle_rollout else None, trained=trained,
            attention_length=length_of(config.rollout.model_dir),
        )  # fmt: skip

    def look(self, config: Config, headers: Sequence[GroupHeader]) -> list[RankBatch]:
        """The share of every data-parallel rank of all samples, for a pass that trains nothing."""
        nothing = [np.zeros(len(header.sample_ids)) for header in headers]
        return build_rank_batches(
            headers, nothing, dp=self.dp, n_minibatches=1, max_tokens=config.runner.max_tokens_per_mbs, share_prefix=True,
            attention_length=length_of(config.rollout.model_dir),
        )  # fmt: skip

    async def work(
        self, method: str, args: Sequence[Any], shares: Sequence[RankBatch], groups: Mapping[str, Ref], parts: Sequence[Part] = ()
    ) -> tuple[list[TrainReport], list[Part]]:
        """Call method(*args, share, *its groups, *the parts that hold any of them) -> (report, numbers) on every rank.

        Returns when all ranks have reported; the numbers are those of the first rank of each data-parallel rank's last stage.
        """
        common, sent = [Shared(a) for a in args], [Shared(share) for share in shares]
        payloads = [[*(groups[g] for g in share.group_ids), *holding(share, parts)] for share in shares]
        calls = [self.group.ref(rank, method, *common, sent[i], *payloads[i], returns=2) for rank, i in enumerate(self.share_of)]
        reports = await self.group.results([report for report, _ in calls])
        return reports, [Part(share, calls[rank][1]) for share, rank in zip(shares, self.answering)]

    async def finish(self, method: str, args: Sequence[Any], shares: Sequence[RankBatch], parts: Sequence[Part]) -> list[TrainReport]:
        """Call method(*args, *the parts that hold any group of its share) -> report on every rank."""
        return await self.group.call_each(method, [(*args, *holding(shares[i], parts)) for i in self.share_of])


@cache
def length_of(model_dir: str) -> int:
    """The context at which attention takes as long as the matrices, by which shares are made even; the actor's, for every role."""
    hf, _warnings = planned_model_config(model_dir)
    return attention_length(hf["hidden_size"]) if hf else ATTENTION_LENGTH


def holding(share: RankBatch, parts: Sequence[Part]) -> list[Ref]:
    """The numbers of those parts that have a group with this share in common."""
    mine = set(share.group_ids)
    return [part.numbers for part in parts if not mine.isdisjoint(part.share.group_ids)]


def summary(reports: Sequence[TrainReport], role: str, peak_tflops: float | None = None) -> dict[str, float]:
    """Metrics, the slowest rank's seconds, the largest memory, and the speeds that follow."""
    slowest = {name: max(r.timers[name] for r in reports) for name in reports[0].timers}
    memory = {f"perf/{role}_memory_gib": max(r.memory_bytes for r in reports) / 2**30}
    return reports[0].metrics | slowest | memory | achieved(reports, role, slowest, peak_tflops)


def achieved(reports: Sequence[TrainReport], role: str, seconds: Mapping[str, float], peak_tflops: float | None) -> dict[str, float]:
    """Operations a second of one rank in each part of the step, and their share of what its device is capable of, where that is known.

    mfu counts what the model asks for, hfu also what activation recompute adds. peak_tflops: runner.peak_tflops; null = the data sheet's.
    """
    peak = peak_tflops * 1e12 if peak_tflops else reports[0].peak_flops
    found = {}
    for part, name in PARTS.items():
        flops = sum(r.flops.get(part, 0.0) for r in reports) / len(reports)
        if not flops:
            continue
        speed = flops / seconds[f"time/{part}"]
        found[f"perf/{role}{name}_tflops"] = speed / 1e12
        if peak:
            found[f"perf/{role}{name}_mfu"] = speed / peak
        if peak and part in TRAINS:
            again = sum(r.flops["again"] for r in reports) / len(reports)
            found[f"perf/{role}{name}_hfu"] = (flops + again) / seconds[f"time/{part}"] / peak
    return found
