"""Which nodes of a Ray cluster a run takes, in which order, and what is said when they are not what the configuration says."""

from __future__ import annotations

from typing import Any

import pytest

from rlinf.cluster import machines
from rlinf.cluster.machines import wait_for_machines
from rlinf.config.schema import ClusterConfig
from rlinf.errors import UserError


def node(host: str, gpus: int, rank: int | None = None, head: bool = False) -> dict[str, Any]:
    resources = {"CPU": 96.0} | ({"GPU": float(gpus)} if gpus else {}) | ({"node:__internal_head__": 1.0} if head else {})
    labels = {} if rank is None else {"rlinf-node-rank": str(rank)}
    return {
        "NodeID": f"id-{host}",
        "NodeManagerAddress": host,
        "NodeManagerPort": 1,
        "Alive": True,
        "Resources": resources,
        "Labels": labels,
    }


HEAD, FIRST, SECOND, SMALL = node("10.0.0.1", 0, head=True), node("10.0.0.2", 8), node("10.0.0.3", 8), node("10.0.0.4", 4)


class Clock:
    """A second a look; one list of nodes for each look, of which the last stays."""

    def __init__(self, *views: list[dict[str, Any]]) -> None:
        self.views, self.now = list(views), 0.0

    def nodes(self) -> list[dict[str, Any]]:
        return self.views.pop(0) if len(self.views) > 1 else self.views[0]

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def taken(monkeypatch: pytest.MonkeyPatch, *views: list[dict[str, Any]], private: bool = False, **cluster: int) -> tuple[list[str], float]:
    """Hosts of the machines by rank, and the seconds that were waited."""
    clock = Clock(*views)
    monkeypatch.setattr(machines.ray, "nodes", clock.nodes)
    monkeypatch.setattr(machines, "listens", lambda _: True)
    monkeypatch.setattr(machines.time, "sleep", clock.sleep)
    monkeypatch.setattr(machines.time, "monotonic", lambda: clock.now)
    config = ClusterConfig(**({"num_nodes": 2, "num_gpus_per_node": 8, "start_timeout": 30} | cluster))
    found = wait_for_machines(config, "cuda", private)
    assert [m.rank for m in found] == list(range(len(found)))
    return [m.host for m in found], clock.now


def test_nodes_are_numbered_by_their_ranks_then_the_head_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = [node("10.0.0.7", 8, 1), node("10.0.0.9", 8, 0)]
    assert taken(monkeypatch, ranked) == (["10.0.0.9", "10.0.0.7"], 0)
    assert taken(monkeypatch, [FIRST, node("10.0.0.8", 8, head=True)])[0] == ["10.0.0.8", "10.0.0.2"]


def test_a_head_without_gpus_is_passed_over_and_waits_for_enough_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(monkeypatch, [HEAD, FIRST, SECOND]) == (["10.0.0.2", "10.0.0.3"], 0)
    assert taken(monkeypatch, [HEAD], [HEAD, SECOND], [HEAD, SECOND, FIRST]) == (["10.0.0.2", "10.0.0.3"], 2)
    assert taken(monkeypatch, [HEAD, FIRST, SMALL, SECOND])[0] == ["10.0.0.2", "10.0.0.3"]


def test_a_rank_says_that_a_node_belongs_to_the_run_and_one_with_too_little_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = node("10.0.0.1", 0, 0, head=True)
    with pytest.raises(UserError, match=r"but node 0 \(10.0.0.1\) has 0 GPUs: lower the key"):
        taken(monkeypatch, [ranked, FIRST, SECOND])
    with pytest.raises(UserError, match=r"but node 1 \(10.0.0.4\) has 4 GPUs: lower the key"):
        taken(monkeypatch, [HEAD, FIRST, SMALL])  # nobody waits for four more
    with pytest.raises(UserError, match=r"but node 0 \(10.0.0.1\) has 0 GPUs"):
        taken(monkeypatch, [HEAD], num_nodes=1, private=True)  # nobody else will come


def test_too_few_are_named_with_what_they_have_at_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        taken(monkeypatch, [HEAD, FIRST])
    assert "only 2 are up, not all with GPUs: 10.0.0.1 (rank not given, 0 GPUs), 10.0.0.2 (rank not given, 8 GPUs)." in str(caught.value)
    with pytest.raises(UserError) as caught:
        taken(monkeypatch, [node("10.0.0.1", 8, 0)])
    assert "only 1 are up: 10.0.0.1 (rank 0, 8 GPUs). No node has rank 1. Run" in str(caught.value)
