"""Parts that functions of the user's own give: what they are called with, how long they may take, and what becomes of their failures.
tests/test_docs_extending.py has more of reward.own_parts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlinf.config.schema import RewardConfig
from rlinf.data.records import Status, Verdict
from rlinf.rewards.own import Response
from rlinf.rewards.own_parts import OwnParts

WRONG = Verdict(-5.0, Status.WRONG, "2", "number", 0.0)
FUNCTIONS = """
import asyncio, resource, threading, time
from concurrent.futures import ThreadPoolExecutor

def rank(responses):  # all threads must be there before one of them goes on
    together = threading.Barrier(len(responses))
    def ask(response):
        together.wait(20)
        return sorted(r.tokens for r in responses).index(response.tokens) / 4
    with ThreadPoolExecutor(len(responses)) as pool:
        return list(pool.map(ask, responses))

def ask(response):
    return {"answer": 1.0}[response.text]

def odd(responses):
    kind = responses[0].text
    if kind == "thread":
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(ask, responses))
    return {"few": [1.0], "nan": [1.0, float("nan")], "text": "12", "by name": {0: 1.0, 1: 2.0}, "one": 1.0, "tuple": (1, True)}[kind]

loops = set()

async def slow(responses):
    loops.add(asyncio.get_running_loop())  # a client that the file keeps would belong to the first
    await asyncio.gather(*(asyncio.sleep(0.7) for _ in responses))
    return [len(loops) + r.tokens for r in responses]

async def twice(response):
    await asyncio.sleep(0)
    return 2 * response.tokens

async def grouped(responses):
    async def fail(response):
        raise Refused("no luck")
    async with asyncio.TaskGroup() as tasks:
        for response in responses:
            tasks.create_task(fail(response))

class Refused(Exception): ...

def limits(response):
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda _: time.sleep(0.2), range(64)))
    return resource.getrlimit(resource.RLIMIT_CPU)[0] == resource.RLIM_INFINITY
"""


def added(folder: Path, texts: list[str], times: int = 1, **reward: object) -> list[Verdict]:
    """The verdicts on responses of 0, 10, 20, ... tokens to one problem; of the last time."""
    (folder / "fns.py").write_text(FUNCTIONS)
    named = {k: {n: f"{folder}/fns.py:{f}" for n, f in v.items()} if isinstance(v, dict) else v for k, v in reward.items()}
    parts = OwnParts(RewardConfig(**{"timeout": 20.0} | named), 1)
    responses = [Response("Q", text, ("3",), "math", "2", False, 10 * i, False, None) for i, text in enumerate(texts)]
    try:
        return [parts.add([WRONG] * len(texts), responses) for _ in range(times)][-1]
    finally:
        parts.close()


def test_a_function_of_the_whole_group_may_ask_for_all_responses_at_the_same_time(tmp_path: Path) -> None:
    found = added(tmp_path, ["a", "b", "c"], own_parts={"twice": "twice"}, own_group_parts={"rank": "rank"})
    assert [v.parts for v in found] == [(("own/twice", 20.0 * i), ("own/rank", i / 4)) for i in range(3)]
    assert [v.reward for v in found] == [-5.0, 15.25, 35.5] and all(v.status is Status.WRONG and not v.failed for v in found)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "few",
            "ValueError: it returned 1 numbers for 2 responses; a function of reward.own_group_parts returns a list of one finite number",
        ),
        ("nan", "TypeError: it returned nan for response 1; a function of reward.own_group_parts returns a list of one finite number"),
        ("text", "TypeError: it returned '12'; a function of reward.own_group_parts returns a list of one finite number for each response"),
        ("by name", "TypeError: it returned {0: 1.0, 1: 2.0}; a function"),
        ("one", "TypeError: it returned 1.0; a function"),
        ("thread", "KeyError: 'thread' (fns.py:14)"),
        ("tuple", None),
    ],
)
def test_a_function_without_a_number_for_each_response_gives_none_of_them_a_part(tmp_path: Path, kind: str, expected: str | None) -> None:
    found = added(tmp_path, [kind, "answer"], own_group_parts={"odd": "odd"})
    assert [v.reward for v in found] == ([-5.0, -5.0] if expected else [-4.0, -4.0])
    assert [v.parts for v in found] == [(("own/odd", 0.0 if expected else 1.0),)] * 2
    for verdict in found if expected else ():
        ((name, why),) = verdict.failed
        assert name == "odd" and why.startswith(expected or "") and verdict.reason == f"odd: {why}"


@pytest.mark.parametrize(("own_timeout", "given"), [(9.0, True), (None, False)])
def test_own_timeout_is_the_time_of_a_call_and_async_functions_are_awaited_in_one_loop(
    tmp_path: Path, own_timeout: float | None, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlinf.rewards.pool.FIRST_SECONDS", 0.1)
    found = added(tmp_path, ["a", "b"], times=2, own_group_parts={"slow": "slow"}, timeout=0.5, own_timeout=own_timeout)
    assert [dict(v.parts)["own/slow"] for v in found] == ([1.0, 11.0] if given else [0.0, 0.0])
    assert given or all("s (reward.own_timeout)" in dict(v.failed)["slow"] for v in found)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup is not there yet")
def test_of_errors_in_a_group_of_tasks_the_first_is_told_with_its_line(tmp_path: Path) -> None:
    found = added(tmp_path, ["a", "b"], own_group_parts={"grouped": "grouped"})
    assert [v.failed for v in found] == [(("grouped", "Refused: no luck (fns.py:36)"),)] * 2


def test_threads_that_wait_fit_into_the_cage_and_have_no_limit_of_processor_time(tmp_path: Path) -> None:
    (found,) = added(tmp_path, ["a"], own_parts={"limits": "limits"})
    assert found.parts == (("own/limits", 1.0),), found.failed
