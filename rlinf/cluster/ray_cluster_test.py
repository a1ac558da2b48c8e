"""The Ray backend with small workers. One private Ray serves all tests that do not break it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.host import ALLOCATOR
from rlinf.cluster.phase import Phase
from rlinf.cluster.processes import marked, new_run_id
from rlinf.cluster.ray_group import RayWorkerGroup, values_of
from rlinf.cluster.same_code import OURS, own_code
from rlinf.config.schema import ClusterConfig
from rlinf.errors import RunFailed, UserError, WorkerLost
from rlinf.scheduling.placement import Plan, Seat
from tests import cluster_workers as workers

SLOTS = 4
PLAN = Plan(tuple(Seat(c, r, 0, (r,)) for c in "abcdef" for r in range(SLOTS)), "collocated")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = ClusterConfig(num_gpus_per_node=SLOTS, device="cpu", threads_per_worker=1, start_timeout=60)
    cluster = Cluster.connect(config, new_run_id(), tmp_path_factory.mktemp("logs"))
    yield cluster
    cluster.close()
    assert marked(cluster.run_id) == []


@pytest.fixture(scope="module")
def plain(shared: Cluster) -> RayWorkerGroup:
    return shared.launch(PLAN, "a", "tests.cluster_workers:Plain", "x", 3)


def test_a_worker_knows_its_seat_before_anything_is_imported(shared: Cluster, plain: RayWorkerGroup) -> None:
    told = asyncio.run(plain.call_all("describe"))
    assert [d["address"].rank for d in told] == list(range(SLOTS))
    assert len({d["pid"] for d in told}) == SLOTS
    for rank, d in enumerate(told):
        assert d["args"] == ("x", 3)
        assert d["address"].devices == (rank,) and d["address"].world_size == SLOTS and d["address"].run_id == shared.run_id
        assert not d["torch"]
        assert d["cwd"] == os.getcwd()
        env, at_start = d["env"], d["at_start"]
        assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == (str(rank), str(SLOTS), str(rank))
        assert env["MASTER_PORT"] == str(told[0]["address"].master_port) and env["MASTER_ADDR"] == "127.0.0.1"
        assert env["GLOO_SOCKET_IFNAME"] == "lo" and env["OMP_NUM_THREADS"] == str(d["address"].threads) and d["address"].threads >= 1
        assert at_start["RLINF_RUN_ID"] == shared.run_id
        assert at_start.items() >= ALLOCATOR.items() and at_start["HF_HUB_OFFLINE"] == "1"
        assert "CUDA_VISIBLE_DEVICES" in env and env["CUDA_VISIBLE_DEVICES"] == ""


def test_a_worker_of_other_code_is_refused_with_both_sides(shared: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run has this test's other side: the same code is taken."""
    code = own_code()
    monkeypatch.setattr("rlinf.cluster.ray_cluster.own_code", lambda: code | {"torch": "1.0", OURS: "of tomorrow"})
    group = shared.launch(PLAN, "f", "tests.cluster_workers:Plain", "x", 3)
    with pytest.raises(UserError) as caught:
        asyncio.run(group.ready())
    expected = (
        f"rlinf's files: the driver has of tomorrow, this node has {code[OURS]}; torch: the driver has 1.0, this node has {code['torch']}"
    )
    assert re.match(r"f rank \d on node 0 \(127\.0\.0\.1\) runs other code than the driver", str(caught.value)), caught.value
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_calls_are_gathered_by_rank_and_counted(plain: RayWorkerGroup) -> None:
    plain.calls.clear()
    assert asyncio.run(plain.call_each("add", [(rank, 10) for rank in range(SLOTS)])) == [10, 11, 12, 13]
    assert asyncio.run(plain.call(2, "add", 1, 2)) == 3
    assert plain.calls == {"add": SLOTS + 1}


def test_who_waits_for_many_answers_can_give_them_up(plain: RayWorkerGroup) -> None:
    handle, given_up, found = plain.ref(3, "sleep", 5.0).handle, threading.Event(), []
    waiting = threading.Thread(target=lambda: found.append(values_of([handle], given_up)))
    waiting.start()
    given_up.set()
    waiting.join(4.0)
    assert not waiting.is_alive() and found == [[]]


def test_a_user_error_in_a_worker_stays_a_user_error(plain: RayWorkerGroup) -> None:
    with pytest.raises(UserError) as caught:
        asyncio.run(plain.call(1, "refuse"))
    assert type(caught.value) is UserError and str(caught.value) == "data.train_data_paths[0]: no such file: x.jsonl"


def test_an_error_names_component_rank_node_method_log_and_traceback(shared: Cluster, plain: RayWorkerGroup) -> None:
    shared.phase = Phase("training")
    with pytest.raises(RunFailed) as caught:
        asyncio.run(plain.call(2, "fail"))
    text = str(caught.value)
    assert text.startswith("a rank 2 (node 0, pid ") and "failed in fail (phase: training): ZeroDivisionError: as asked" in text
    assert "cluster_workers.py" in text and 'raise ZeroDivisionError("as asked")' in text and str(shared.log_dir / "a-2.log") in text


def test_payloads_stay_where_they_are_made_and_travel_between_workers(shared: Cluster, plain: RayWorkerGroup) -> None:
    rollout = shared.launch(PLAN, "b", workers.Async)

    async def main() -> None:
        refs = [rollout.ref(0, "generate", size, returns=2) for size in (10, 200_000, 30)]
        headers = [await header for header, _ in refs]
        assert [h["size"] for h in headers] == [10, 200_000, 30]
        payloads = [payload for _, payload in refs]
        assert await plain.call(3, "sum_of", *payloads) == 200_040
        assert await rollout.call(0, "most_at_once") == 3
        assert await plain.call(2, "mixed", 1, payloads[0], 3, payloads[2]) == (1, 10, 3, 30)
        with pytest.raises(TypeError, match="generate: the first result of a call is its caller's"):
            await plain.call(3, "sum_of", refs[0][0])
        header, payload = await rollout.call(1, "generate", 5, returns=2)
        assert header["size"] == 5 and payload.sum() == 5

    asyncio.run(main())


def test_what_a_worker_and_its_children_write_is_in_its_log(shared: Cluster, plain: RayWorkerGroup) -> None:
    asyncio.run(plain.call(0, "say", "hello"))
    text = (shared.log_dir / "a-0.log").read_text()
    assert "hello\n" in text and "child of hello\n" in text


def test_a_worker_that_computes_can_be_asked_for_its_stacks(plain: RayWorkerGroup) -> None:
    async def main() -> dict[int, str]:
        asleep = asyncio.ensure_future(plain.call(1, "sleep", 2.0))
        told: dict[int, str] = {}
        while "in sleep" not in told.get(1, "") and not asleep.done():
            told = await asyncio.to_thread(plain.stacks, [0, 1], 30.0)
        await asleep
        return told

    told = asyncio.run(main())
    assert 'cluster_workers.py"' in told[1] and "in sleep" in told[1] and "in sleep" not in told[0]


def test_ranks_that_die_at_once_are_all_forgiven_and_a_new_one_has_its_time_to_start(shared: Cluster) -> None:
    group = shared.launch(PLAN, "e", workers.Async)
    group.deaths_allowed = SLOTS

    async def main() -> None:
        await group.ready()
        waiting = [asyncio.ensure_future(group.call(rank, "forever")) for rank in range(SLOTS)]
        await asyncio.sleep(0.3)
        for pid in group.pids:
            os.kill(pid, signal.SIGKILL)
        assert [type(e) for e in await asyncio.gather(*waiting, return_exceptions=True)] == [WorkerLost] * SLOTS
        assert group.deaths_allowed == 0
        await group.restart(0)
        assert await group.call(0, "most_at_once") == 0
        group.start_timeout = 0.01
        with pytest.raises(RunFailed, match=r"e rank 1 .*was not ready within cluster.start_timeout = 0.01 s after it was started anew"):
            await group.restart(1)

    asyncio.run(shared.guard(main()))


def test_a_failing_constructor_is_reported_without_waiting_for_its_peers(shared: Cluster) -> None:
    group = shared.launch(PLAN, "c", workers.Broken, 2)
    started = time.monotonic()
    with pytest.raises(RunFailed, match=r"c rank 2 \(node 0\) failed in __init__ .*ValueError: no model here"):
        asyncio.run(group.ready())
    assert time.monotonic() - started < 40  # they sleep for 60 s


def test_a_failing_rank_is_reported_while_its_peers_are_stuck(shared: Cluster) -> None:
    group = shared.launch(PLAN, "d", "tests.cluster_workers:Collective")

    async def main() -> None:
        totals = await group.call_all("total")
        assert totals == [(6.0, 1)] * SLOTS
        started = time.monotonic()
        with pytest.raises(RunFailed, match="d rank 1 .*ZeroDivisionError: left the others alone"):
            await group.call_all("total_without", 1, True)
        assert time.monotonic() - started < 5

    asyncio.run(main())
