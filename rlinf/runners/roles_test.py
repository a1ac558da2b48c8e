"""Which rank's numbers go to which rank, when two roles cut the same batch in layouts of their own."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from rlinf.cluster.failure import Failure
from rlinf.cluster.group import Ref, Shared, WorkerGroup
from rlinf.config.schema import ActorModelConfig, Config
from rlinf.data.records import Finish, GroupHeader, Status, Verdict
from rlinf.metrics.names import undocumented
from rlinf.runners.roles import Part, Role, holding, summary
from rlinf.scheduling.placement import Seat
from rlinf.workers.interfaces import TrainReport

NAMES = [f"g{i}" for i in range(8)]


class Recorded(WorkerGroup):
    """Ranks that note what they are called with, and return a report and their own number."""

    def __init__(self, component: str, size: int) -> None:
        super().__init__(component, [Seat(component, rank, 0, (rank,)) for rank in range(size)], Failure(), 5.0)
        self.seen: dict[int, tuple[Any, ...]] = {}

    async def ready(self) -> None:
        """They are from the start."""

    def submit(self, rank: int, method: str, args: tuple[Any, ...], returns: int) -> list[Any]:
        self.seen[rank] = tuple(a.value if isinstance(a, Shared) else a for a in args)
        report = TrainReport({"loss": 1.0}, {"time/x": float(rank)}, memory_bytes=(rank + 1) << 30)
        return [report, f"{self.component} {rank}"][:returns]

    def resolve(self, handle: Any) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(handle)
        return answer

    async def explain(self, error: BaseException, ref: Ref) -> BaseException:
        return error

    def where(self, rank: int) -> str:
        return f"{self.component} rank {rank}"


def headers() -> list[GroupHeader]:
    verdict = Verdict(1.0, Status.RIGHT, "1", "string", 0.0)
    return [
        GroupHeader(n, n, "math", 3, (f"{n}/0",), (4 + i,), (4 + i,), (Finish.STOP,), (((0, 4),),), (verdict,)) for i, n in enumerate(NAMES)
    ]


def role(component: str, tp: int, pp: int, dp: int, cp: int = 1) -> tuple[Recorded, Role]:
    group = Recorded(component, tp * cp * pp * dp)
    return group, Role(group, ActorModelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp))


@pytest.mark.parametrize(("critic_layout", "actor_layout"), [
    ((1, 1, 2, 1), (2, 2, 1, 1)), ((2, 2, 2, 1), (1, 1, 4, 1)), ((1, 2, 2, 1), (2, 1, 2, 1)), ((1, 1, 1, 1), (1, 1, 1, 1)),
    ((2, 2, 2, 2), (1, 1, 2, 4)),
])  # fmt: skip
def test_every_rank_gets_its_groups_and_the_numbers_of_all_of_them(critic_layout: tuple[int, ...], actor_layout: tuple[int, ...]) -> None:
    async def step() -> None:
        config, batch = Config(), headers()
        config.algorithm.n_minibatches = 1
        payload = {}
        (critics, critic), (actors, actor) = role("critic", *critic_layout), role("actor", *actor_layout)
        for name in NAMES:
            payload[name] = Ref(critics, 0, "generate", f"tokens of {name}", payload=True)
        cut = (config, 1, batch, [np.ones(1)] * 8, [np.ones(1, bool)] * 8)
        critic_shares, actor_shares = critic.split(*cut), actor.split(*cut)
        _, values = await critic.work("values", (1,), critic_shares, payload)
        # numbers come from the first rank of the last stage: TP fastest, then CP, then DP, then PP
        tp, pp, dp, cp = critic_layout
        assert [p.numbers.handle for p in values] == [f"critic {((pp - 1) * dp + d) * tp * cp}" for d in range(dp)]
        _, targets = await actor.work("train_step", (1, "dump"), actor_shares, payload, values)
        tp, pp, dp, cp = actor_layout
        for rank, (step, dump, share, *rest) in actors.seen.items():
            assert (step, dump) == (1, "dump") and share is actor_shares[rank // (tp * cp) % dp]
            names, numbers = share.group_ids, rest[len(share.group_ids) :]
            assert rest[: len(names)] == [f"tokens of {n}" for n in names]
            assert numbers == [v.numbers.handle for v in values if set(v.share.group_ids) & set(names)] and numbers
        await critic.finish("train_step", (1,), critic_shares, targets)
        for rank, (step, *numbers) in critics.seen.items():
            share = critic_shares[rank // (critic_layout[0] * critic_layout[3]) % critic_layout[2]]
            held = {g for t in targets if t.numbers.handle in numbers for g in t.share.group_ids}
            assert set(share.group_ids) <= held

    asyncio.run(step())


def test_numbers_of_other_groups_are_not_sent_and_the_slowest_rank_counts() -> None:
    _, actor = role("actor", 1, 1, 2)
    config = Config()
    config.algorithm.n_minibatches = 1
    first, second = actor.split(config, 1, headers(), [np.ones(1)] * 8, [np.ones(1, bool)] * 8)
    assert set(first.group_ids) | set(second.group_ids) == set(NAMES) and not set(first.group_ids) & set(second.group_ids)
    parts = [Part(first, "a"), Part(second, "b")]  # type: ignore[arg-type]
    assert holding(first, parts) == ["a"] and holding(second, parts) == ["b"]
    reports = [TrainReport({"loss": 1.0}, {"time/x": s}, memory_bytes=m << 30) for s, m in ((2.0, 1), (3.0, 4), (1.0, 2))]
    assert summary(reports, "critic") == {"loss": 1.0, "time/x": 3.0, "perf/critic_memory_gib": 4.0}


def report(seconds: float, peak: float = 0.0) -> TrainReport:
    flops = {"recompute_logprobs": 2e12, "forward_backward": 6e12, "again": 1.5e12}
    return TrainReport({"train/loss": 1.0}, {"time/recompute_logprobs": 1.0, "time/forward_backward": seconds}, 2**30, False, flops, peak)


def test_speeds_are_of_one_device_and_of_the_slowest_ranks_seconds() -> None:
    found = summary([report(3.0), report(2.0)], "actor")
    assert found == {
        "train/loss": 1.0, "time/recompute_logprobs": 1.0, "time/forward_backward": 3.0, "perf/actor_memory_gib": 1.0,
        "perf/actor_recompute_tflops": 2.0, "perf/actor_tflops": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(("data_sheet", "key"), [(8e12, None), (99e12, 8.0)])
def test_utilisation_where_the_peak_is_known(data_sheet: float, key: float | None) -> None:
    found = summary([report(3.0, data_sheet)] * 2, "actor", key)
    assert (found["perf/actor_mfu"], found["perf/actor_hfu"], found["perf/actor_recompute_mfu"]) == (0.25, 0.3125, 0.25)
    assert undocumented(found) == []


def test_a_part_that_was_not_run_has_no_speed() -> None:
    idle = TrainReport({}, {"time/values": 1.0}, 0, False, {"values": 0.0, "again": 0.0})
    assert set(summary([idle], "critic")) == {"time/values", "perf/critic_memory_gib"}
