from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlinf.cluster.cluster import Cluster
from rlinf.cluster.host import visible_devices
from rlinf.cluster.phase import Phase
from rlinf.cluster.processes import new_run_id
from rlinf.config.schema import ClusterConfig
from rlinf.errors import RunFailed, UserError
from rlinf.scheduling.placement import Plan, Seat
from tests import cluster_workers as workers

ROOT = Path(__file__).resolve().parent.parent.parent
PLAN = Plan((Seat("actor", 0, 0, (0,)), Seat("rollout", 0, 0, (0,))), "collocated")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    opened = Cluster.connect(ClusterConfig(backend="local", device="cpu"), new_run_id(), tmp_path)
    yield opened
    opened.close()


def test_sync_and_async_workers_live_in_this_process_and_payloads_are_the_objects(cluster: Cluster) -> None:
    async def main() -> None:
        actor = cluster.launch(PLAN, "actor", workers.Plain, "x")
        rollout = cluster.launch(PLAN, "rollout", "tests.cluster_workers:Async")
        refs = [rollout.ref(0, "generate", size, returns=2) for size in (3, 4)]
        assert [(await header)["size"] for header, _ in refs] == [3, 4]
        assert await rollout.call(0, "most_at_once") == 2
        assert await actor.call(0, "sum_of", *[payload for _, payload in refs]) == 7
        assert await refs[0][1] is await refs[0][1]
        told = (await actor.call_all("describe"))[0]
        assert told["pid"] == os.getpid() and told["address"].world_size == 1 and told["args"] == ("x",)
        assert rollout.calls == {"generate": 2, "most_at_once": 1}

    asyncio.run(cluster.guard(main()))


def test_sync_work_does_not_block_the_loop(cluster: Cluster) -> None:
    async def main() -> None:
        actor = cluster.launch(PLAN, "actor", workers.Plain)
        rollout = cluster.launch(PLAN, "rollout", workers.Async)
        await actor.ready()
        started = time.monotonic()
        await asyncio.gather(actor.call(0, "sleep", 0.3), *[rollout.call(0, "generate", 1, returns=2) for _ in range(5)])
        assert time.monotonic() - started < 0.5

    asyncio.run(main())


def test_errors_are_those_of_the_ray_backend(cluster: Cluster) -> None:
    async def main() -> None:
        cluster.phase = Phase("training")
        actor = cluster.launch(PLAN, "actor", workers.Plain)
        with pytest.raises(UserError, match="no such file: x.jsonl"):
            await actor.call_all("refuse")
        expected = r"actor rank 0 \(this process\) failed in fail \(phase: training\): ZeroDivisionError: as asked"
        with pytest.raises(RunFailed, match=expected):
            await actor.call(0, "fail")
        broken = cluster.launch(PLAN, "rollout", workers.Broken, 0)
        with pytest.raises(RunFailed, match="ValueError: no model here"):
            await broken.call(0, "add", 1, 2)

    asyncio.run(main())


def test_the_traceback_of_a_call_with_two_results_leads_to_the_line_that_failed(cluster: Cluster) -> None:
    async def main() -> None:
        actor = cluster.launch(PLAN, "actor", workers.Plain)
        report, _ = actor.ref(0, "fail", returns=2)
        with pytest.raises(RunFailed, match=r"cluster_workers\.py\", line \d+, in fail\n"):
            await actor.results([report])

    asyncio.run(main())


def test_more_than_one_device_needs_ray(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cluster.num_gpus_per_node"):
        Cluster.connect(ClusterConfig(backend="local", num_gpus_per_node=2), "x", tmp_path)


def test_a_reported_failure_ends_the_loop_and_every_call(cluster: Cluster) -> None:
    async def main() -> None:
        rollout = cluster.launch(PLAN, "rollout", workers.Async)
        await rollout.ready()
        asyncio.get_running_loop().call_later(0.1, cluster.failure.report, RunFailed("node 3 is gone"))
        with pytest.raises(RunFailed, match="node 3 is gone"):
            await rollout.call(0, "forever")
        with pytest.raises(RunFailed, match="node 3 is gone"):
            rollout.ref(0, "forever")
        await asyncio.sleep(60)

    started = time.monotonic()
    with pytest.raises(RunFailed, match="node 3 is gone"):
        asyncio.run(cluster.guard(main()))
    assert time.monotonic() - started < 2


def test_devices_are_counted_among_the_visible_ones() -> None:
    assert visible_devices((0, 2), None) == "0,2"
    assert visible_devices((0, 1), "5,GPU-abc,7") == "5,GPU-abc"


def test_the_driver_needs_neither_torch_nor_ray_for_the_local_backend() -> None:
    code = (
        "import sys; from pathlib import Path; from rlinf.cluster.cluster import Cluster;"
        "from rlinf.config.schema import ClusterConfig;"
        "Cluster.connect(ClusterConfig(backend='local', device='cpu'), 'x', Path('/nowhere')).close();"
        "print([m for m in ('torch', 'ray', 'megatron') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.timeout(30)
def test_closing_does_not_wait_for_a_sentinel_that_was_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has only just been started does not carry the run's mark yet, and would watch this process as long as it lives."""
    opened = Cluster.connect(ClusterConfig(backend="local", device="cpu"), new_run_id(), tmp_path)
    monkeypatch.setattr("rlinf.cluster.local_cluster.end_run", lambda run_id: [])
    opened.close()
    assert opened.sentinel.poll() is not None
