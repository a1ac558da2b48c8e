"""What is said of nodes that answer late or not at all. Ray is stood in for; tests/test_ray_utils.py stops a real node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from rlinf.cluster import node_probe
from rlinf.cluster.node_probe import NodeView, SilentNode, views


class Task:
    """In Ray's place: `answers` has the answers of each node, by its id; an exception is raised when the answer is asked for."""

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.answers, self.waited = answers, 0.0

    def options(self, num_cpus: int, scheduling_strategy: Any) -> SimpleNamespace:
        assert num_cpus == 0 and not scheduling_strategy.soft
        return SimpleNamespace(remote=lambda _: self.answers[scheduling_strategy.node_id].pop(0))

    def wait(self, answers: list[Any], num_returns: int, timeout: float) -> None:
        self.waited += timeout

    @staticmethod
    def get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[Any]]], tuple[list[NodeView | SilentNode], Task]]:
    def ask(answers: dict[str, list[Any]]) -> tuple[list[NodeView | SilentNode], Task]:
        task = Task(answers)
        monkeypatch.setattr(node_probe.ray, "remote", lambda _: task)
        monkeypatch.setattr(node_probe.ray, "wait", task.wait)
        monkeypatch.setattr(node_probe.ray, "get", task.get)
        monkeypatch.setattr(node_probe.time, "time", iter(range(1000, 2000, 2)).__next__)
        nodes = [
            {"NodeID": name, "NodeManagerAddress": f"10.0.0.{rank}", "Labels": {"rlinf-node-rank": str(rank)} if rank else {}}
            for rank, name in enumerate(answers)
        ]
        return views(nodes, Path("/shared/marker")), task

    return ask


def test_a_clock_is_compared_with_the_middle_of_question_and_answer(ask: Callable) -> None:
    """Asked at 1000, answered at 1002: a clock at 1006 is ahead by 5 s, give or take 1."""
    found, _ = ask({"ab" * 28: [(0.0, True), (1006.0, False)]})
    assert found == [NodeView("?", "10.0.0.0", ahead=5.0, within=1.0, sees=False)]


def test_a_node_that_does_not_answer_is_a_finding_and_the_others_are_asked(ask: Callable) -> None:
    silent, dead, well = "aa" * 28, "bb" * 28, "cc" * 28
    died = RayActorError()
    found, task = ask({silent: [GetTimeoutError()], dead: [(0.0, True), died], well: [(0.0, True), (1005.0, True)]})
    assert found[0] == SilentNode("?", "10.0.0.0", "did not answer within 60 s")
    assert found[1] == SilentNode("1", "10.0.0.1", f"failed: {str(died).splitlines()[0]}")
    assert isinstance(found[2], NodeView) and found[2].rank == "2" and found[2].sees
    assert task.waited == 60.0  # for all together
