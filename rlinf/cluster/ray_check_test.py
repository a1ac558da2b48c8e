"""What check_ray counts, and whom it names."""

from __future__ import annotations

from typing import Any

import pytest

from rlinf.cluster import machines, ray_check
from rlinf.cluster.ray_check import wait_for_devices


def node(host: str, rank: int | None, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    """A node as Ray lists it, with 96 cores. rank: of start_ray.sh; None for KubeRay's."""
    return {
        "NodeID": host,
        "NodeManagerAddress": host,
        "NodeManagerPort": 1,
        "Alive": alive,
        "Resources": ({"CPU": 96.0} | ({"GPU": float(gpus)} if gpus else {})) if alive else {},
        "Labels": {} if rank is None else {"rlinf-node-rank": str(rank), "rlinf-node-gpus": str(gpus)},
    }


def told(wanted: int, nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[bool, str]:
    """Whether there are enough devices, and the first line about it."""
    monkeypatch.setattr(ray_check.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(machines, "listens", lambda _: True)
    monkeypatch.setattr(ray_check.time, "sleep", lambda _: None)
    found = wait_for_devices(wanted, timeout=0.0)
    return found, capsys.readouterr().err.splitlines()[0].removeprefix("check_ray: ")


def test_slots_do_not_pass_for_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """8 GPUs and 96 slots are 8 devices; the node that came without its GPUs is named."""
    enough, line = told(16, [node("10.0.0.1", 0, gpus=8), node("10.0.0.2", 1)], monkeypatch, capsys)
    assert not enough
    assert line == "8 of 16 GPUs on 2 nodes; node 1 (10.0.0.2) has no GPU and does not count"
    _, line = told(24, [node("10.0.0.1", 0), node("10.0.0.2", 1, gpus=8)], monkeypatch, capsys)
    assert line == "8 of 24 GPUs on 2 nodes; node 0 (10.0.0.1) has no GPU and does not count; no node has RANK 2"


def test_slots_do_not_count_when_the_nodes_with_gpus_have_died(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node("10.0.0.1", 0), node("10.0.0.2", 1, gpus=8, alive=False)]
    enough, line = told(8, nodes, monkeypatch, capsys)
    assert not enough and line.startswith("0 of 8 GPUs on 1 nodes; node 1 (10.0.0.2) is dead; node 0 (10.0.0.1) has no GPU")


def test_a_head_without_gpus_does_not_keep_the_others_from_being_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [node("10.0.0.1", None), node("10.0.0.2", None, gpus=8), node("10.0.0.3", None, gpus=8)]
    enough, line = told(16, nodes, monkeypatch, capsys)
    assert enough and line.startswith("16 of 16 GPUs on 3 nodes: a node without RANK (10.0.0.1) 0, a node without RANK (10.0.0.2) 8")


def test_slots_are_counted_where_no_node_has_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    enough, line = told(300, [node("10.0.0.1", 0), node("10.0.0.2", 1)], monkeypatch, capsys)
    assert not enough and line == "192 of 300 CPU slots on 2 nodes; no node has RANK 2, 3"
    assert told(192, [node("10.0.0.1", 0), node("10.0.0.2", 1)], monkeypatch, capsys) == (
        True,
        "192 of 192 CPU slots on 2 nodes: node 0 (10.0.0.1) 96, node 1 (10.0.0.2) 96",
    )


@pytest.mark.parametrize("rank", [None, 1])
def test_a_dead_node_is_named_until_another_has_its_place(
    rank: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without RANK, such as KubeRay's, by its address."""
    first, dead = node("10.0.0.1", rank and 0, gpus=8), node("10.0.0.2", rank, gpus=8, alive=False)
    name = "a node without RANK" if rank is None else "node 1"
    assert told(16, [first, dead], monkeypatch, capsys)[1] == f"8 of 16 GPUs on 1 nodes; {name} (10.0.0.2) is dead"
    assert "is dead" not in told(99, [first, dead, node("10.0.0.2", rank, gpus=8)], monkeypatch, capsys)[1]
