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
from rlinf.runners.roles import Part, Role, holding
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
        _, values = await critic.run("values", (), critic_shares, payload)
        # numbers come from the first rank of the last stage: TP fastest, then CP, then DP, then PP
        tp, pp, dp, cp = critic_layout
        assert [p.numbers.handle for p in values] == [f"critic {((pp - 1) * dp + d) * tp * cp}" for d in range(dp)]
        _, targets = await actor.run("train_step", (1, "dump"), actor_shares, payload, values)
        tp, pp, dp, cp = actor_layout
        for rank, (step, dump, share, *rest) in actors.seen.items():
            assert (step, dump) == (1, "dump") and share is actor_shares[rank // (tp * cp) % dp]
            names, numbers = share.group_ids, rest[len(share.group_ids) :]
            assert rest[: len(names)] == [f"tokens of {n}" for n in names]
            assert numbers == [v.numbers.handle for v in values if set(v.share.group_ids) & set(names)] and numbers
        await critic.run_on_kept_batch("train_step", (1,), critic_shares, targets)
        for rank, (step, *numbers) in critics.seen.items():
            share = critic_shares[rank // (critic_layout[0] * critic_layout[3]) % critic_layout[2]]
            held = {g for t in targets if t.numbers.handle in numbers for g in t.share.group_ids}
            assert set(share.group_ids) <= held

    asyncio.run(step())


def test_numbers_of_other_groups_are_not_sent() -> None:
    _, actor = role("actor", 1, 1, 2)
    config = Config()
    config.algorithm.n_minibatches = 1
    first, second = actor.split(config, 1, headers(), [np.ones(1)] * 8, [np.ones(1, bool)] * 8)
    assert set(first.group_ids) | set(second.group_ids) == set(NAMES) and not set(first.group_ids) & set(second.group_ids)
    parts = [Part(first, "a"), Part(second, "b")]  # type: ignore[arg-type]
    assert holding(first, parts) == ["a"] and holding(second, parts) == ["b"]
