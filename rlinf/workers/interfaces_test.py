"""The contracts say what the workers have and what the loops call: nothing more, nothing less."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from rlinf.workers import interfaces
from rlinf.workers.actor import ActorWorker
from rlinf.workers.critic import CriticWorker
from rlinf.workers.journal import JournalWorker
from rlinf.workers.reward import RewardWorker
from rlinf.workers.rollout import RolloutWorker
from rlinf.workers.sft import SftWorker
from rlinf.workers.token_reward import TokenRewardWorker

WORKERS = (ActorWorker, CriticWorker, TokenRewardWorker, SftWorker, RolloutWorker, RewardWorker, JournalWorker)
LOOPS = [Path(__file__).parents[1] / room for room in ("launch", "runners", "evaluation")]
CALLS = {"ref", "call", "call_all", "call_ranks", "call_each", "ask_all", "ask_each", "ask_once", "run", "run_on_kept_batch"}


def methods(kind: type) -> dict[str, inspect.Signature]:
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: inspect.signature(method) for name, method in found if not name.startswith("_")}


def called(file: Path) -> set[str]:
    """Names of worker methods in the calls of a file: the first text among the first two arguments."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    asked = [c.args[:2] for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in CALLS]
    texts = [[a.value for a in args if isinstance(a, ast.Constant) and isinstance(a.value, str)] for args in asked]
    return {found[0] for found in texts if found}


@pytest.mark.parametrize("worker", WORKERS, ids=lambda worker: worker.__name__)
def test_a_worker_has_the_methods_of_its_contract(worker: type) -> None:
    real = methods(worker)
    for name, promised in methods(getattr(interfaces, worker.__name__)).items():
        assert name in real, name
        assert [*real[name].parameters.values()] == [*promised.parameters.values()], name
        assert real[name].return_annotation == promised.return_annotation, name


def test_what_the_loops_call_stands_in_a_contract_and_the_other_way_round() -> None:
    files = [f for room in LOOPS for f in room.glob("*.py") if not f.name.endswith("_test.py")]
    promised = set().union(*(methods(getattr(interfaces, worker.__name__)) for worker in WORKERS))
    assert set().union(*map(called, files)) == promised
