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
            shuffle_seed=(config.data.seed, step) if a.shuffle_rollout else None, trained=trained, zero_teaches=a.zero_teaches,
            attention_length=length_of(config.rollout.model_dir),
        )  # fmt: skip

    def split_all(self, config: Config, headers: Sequence[GroupHeader]) -> list[RankBatch]:
        """The share of every data-parallel rank of all samples, for a pass that trains nothing."""
        nothing = [np.zeros(len(header.sample_ids)) for header in headers]
        return build_rank_batches(
            headers, nothing, dp=self.dp, n_minibatches=1, max_tokens=config.runner.max_tokens_per_mbs, share_prefix=True,
            attention_length=length_of(config.rollout.model_dir),
        )  # fmt: skip

    async def run(
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

    async def run_on_kept_batch(
        self, method: str, args: Sequence[Any], shares: Sequence[RankBatch], parts: Sequence[Part]
    ) -> list[TrainReport]:
        """Call method(*args, *the parts that hold any group of its share) -> report on every rank; it has kept its share."""
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
