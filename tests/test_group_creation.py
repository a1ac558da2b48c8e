"""The places that make process groups for weights, driven as in a run: all members come to each group, whatever the layout."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlinf.config.schema import Config
from rlinf.rollout import sglang_engine
from rlinf.rollout.sglang_engine import SGLangEngine
from rlinf.weights.routes import BROADCAST, BroadcastGroup, Feed, broadcast_groups
from rlinf.workers import actor, rollout
from rlinf.workers.actor import ActorWorker
from rlinf.workers.rollout import RolloutWorker

STORE = ("127.0.0.1", 1)
Orders = dict[str, list[BroadcastGroup]]  # member -> the groups that it makes, as it makes them
LAYOUTS = list(product((1, 2, 8), (1, 3, 8), (1, 2, 4), (1, 5, 16), (1, 8)))  # width, PP, DP, replicas, TP of an engine


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Orders:
    """What stands for the groups writes down who makes which."""
    found: Orders = {}

    def make(group: BroadcastGroup, *names: str) -> SimpleNamespace:
        for name in names:
            found.setdefault(name, []).append(group)
        names_first = group.members.index(names[0])
        return SimpleNamespace(first_rank=names_first, together=lambda _: nullcontext())

    for module in (actor, rollout, sglang_engine):
        monkeypatch.setattr(module, "open_store", lambda *_, **__: None)
    for module in (actor, rollout):
        monkeypatch.setattr(module, "Wire", lambda group, member, *_: make(group, member))
    monkeypatch.setattr(actor, "ServerWire", lambda group, *_: make(group, group.members[0]))
    monkeypatch.setattr(sglang_engine, "Follower", lambda group, engine, *_: make(group, *group.names_of(engine)))
    return found


def join_all(groups: tuple[BroadcastGroup, ...], ranks: int, replicas: int, backend: str, asked: list[dict[str, Any]]) -> None:
    """Every actor rank and every rollout worker joins, as WeightSync asks them to."""
    config = Config()
    config.rollout.rollout_backend = backend

    async def ask(path: str, body: dict[str, Any], timeout: float) -> None:
        asked.append(body)

    for rank in range(ranks):
        worker: Any = ActorWorker.__new__(ActorWorker)
        worker.address, worker.config, worker.device = SimpleNamespace(rank=rank), config, None
        worker.publisher = SimpleNamespace(wire=None)
        worker.join(STORE, groups)
    for rank in range(replicas):
        engine: Any = SimpleNamespace()
        if backend == "sglang":
            engine = SGLangEngine.__new__(SGLangEngine)
            engine._groups, engine._device, engine._with_others = {}, "cpu", ask
        side: Any = RolloutWorker.__new__(RolloutWorker)
        side.address, side.start_timeout, side.engine, side.device, side.wires = SimpleNamespace(rank=rank), 1, engine, None, {}
        asyncio.run(side.join(STORE, groups))


def made_in_order(groups: tuple[BroadcastGroup, ...], orders: Orders) -> bool:
    """Whether all groups come about when every member waits in its first unmade group until all members are there."""
    left = {member: [*mine] for member, mine in orders.items()}
    while any(left.values()):
        ready = [g for g in groups if all(left.get(m) and left[m][0] == g for m in g.members)]
        if not ready:
            return False
        for group in ready:
            for member in group.members:
                left[member].pop(0)
    return True


def layouts(backend: str) -> Iterator[tuple[tuple[BroadcastGroup, ...], int, int]]:
    """(groups, actor ranks, engines): engines fed by turns, and all by the last replica."""
    for width, pp, dp, replicas, engine_tp in LAYOUTS:
        for replica_of in (lambda e: e % dp, lambda _: dp - 1):  # noqa: B023  # used at once
            feeds = [Feed(replica_of(e), BROADCAST) for e in range(replicas)]
            yield broadcast_groups(feeds, width, pp, dp, engine_tp if backend == "sglang" else 1), width * pp * dp, replicas


@pytest.mark.parametrize("backend", ["embedded", "sglang"])
def test_nobody_waits_for_ever_in_any_layout(orders: Orders, backend: str) -> None:
    for groups, ranks, replicas in layouts(backend):
        orders.clear()
        asked: list[dict[str, Any]] = []
        join_all(groups, ranks, replicas, backend, asked)
        assert {*orders} == {member for group in groups for member in group.members}
        assert made_in_order(groups, orders)
        if backend == "sglang":  # each server is told the places of its ranks in each of its groups
            told = [(body["group_name"], body["rank_offset"], body["world_size"]) for body in asked]
            wanted = [
                (g.name, g.members.index(g.names_of(e)[0]), len(g.members)) for e in range(replicas) for g in groups if e in g.engines
            ]
            assert told == wanted and len(set(told)) == len(told)


def test_opposite_orders_would_be_found(orders: Orders) -> None:
    groups = broadcast_groups((Feed(0, BROADCAST), Feed(0, BROADCAST)), 1, 2, 1)
    join_all(groups, 2, 2, "embedded", [])
    assert made_in_order(groups, orders)
    orders["rollout rank 1"].reverse()
    assert not made_in_order(groups, orders)


def test_groups_are_made_nowhere_else() -> None:
    """Megatron's, which all ranks of a role make at its start, in one order; and those above."""
    makers = {"new_group", "init_process_group", "ProcessGroupGloo", "ProcessGroupNCCL", "make_process_group", "initialize_model_parallel"}
    found = set()
    package = Path(__file__).parents[1] / "rlinf"
    for file in package.rglob("*.py"):
        if file.name.endswith("_test.py") or package / "checks" in file.parents:  # which have no engines beside them
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in makers:
                found.add(str(file.relative_to(package)))
    assert found == {"training/parallel.py", "weights/broadcast.py", "weights/server_groups.py"}
