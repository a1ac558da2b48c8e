"""Whole runs over nodes that share nothing but a folder: own networks, own process tables, own /dev/shm, own homes."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlinf.rollout.sglang_server import find_interpreter
from tests.namespaces import SUBNET, NamespaceNode, ip, possible
from tests.pretend_gpu import IMPOSSIBLE
from tests.sglang_here import REASON
from tests.tiny_run import lines, write_run

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not possible(), reason="network namespaces need root")]


@pytest.fixture
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[NamespaceNode]]:
    """As many nodes as asked for, each a member of one Ray cluster; a pair: and pretend GPUs on each."""
    count, gpus = request.param if isinstance(request.param, tuple) else (request.param, 0)
    tag, made, port = f"rl{os.getpid() % 10000}", [], random.randrange(6400, 9900)
    shutil.copytree(ROOT / "ray_utils", tmp_path / "ray_utils", ignore=shutil.ignore_patterns("ray_*.txt", "ray_token"))
    for name in ("rlinf", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    try:
        ip("link", "add", f"{tag}br", "type", "bridge")
        ip("link", "set", f"{tag}br", "up")
        made += [NamespaceNode(rank, tmp_path, tag, port, gpus) for rank in range(count)]
        starts = [node.popen("bash", "ray_utils/start_ray.sh") for node in made]
        for start in starts:
            _, errors = start.communicate(timeout=300)
            assert start.returncode == 0, errors
        yield made
    finally:
        for node in made:
            node.close()
        subprocess.run(["ip", "link", "del", f"{tag}br"], capture_output=True)


def config(folder: Path, nodes: int, actor: str, others: str, pp: int, steps: int, **overrides: object) -> Path:
    """Two slots on every node; the actor is TP 2 x PP `pp`."""
    return write_run(
        folder, cluster__num_nodes=nodes, cluster__num_gpus_per_node=2,
        cluster__component_placement={"actor": actor, "rollout,reward": others}, cluster__start_timeout=300,
        actor__model__tensor_model_parallel_size=2, actor__model__pipeline_model_parallel_size=pp,
        runner__max_steps=steps, runner__val_check_interval=0, runner__save_interval=0, **overrides,
    )  # fmt: skip


def one_policy(steps: list[dict]) -> bool:
    """Whether the engines ran the actor's weights in every step, also after updates."""
    return all(m["train/rollout_logprob_gap_max"] <= 1e-4 for m in steps)


ON_GPUS = pytest.param((4, 2), marks=pytest.mark.skipif(IMPOSSIBLE is not None, reason=str(IMPOSSIBLE)))


@pytest.mark.parametrize("nodes", [4, ON_GPUS], indirect=True, ids=["cpu", "pretend gpu"])
def test_four_nodes_train_one_model(nodes: list[NamespaceNode]) -> None:
    """TP 2 x PP 2 over two nodes, a stage on each; engines on two others: tokens and verdicts cross, weights come by broadcast."""
    folder, wires = nodes[0].folder, {"rollout__weight_transport": "broadcast", "rollout__max_engine_restarts": 0}
    wires["cluster__device"] = "cuda" if nodes[0].gpus else "cpu"
    run = nodes[0].popen(sys.executable, "-m", "rlinf", "train", str(config(folder, 4, "0-3", "4,6", pp=2, steps=2, **wires)))
    _, errors = run.communicate(timeout=400)
    assert run.returncode == 0, errors[-4000:]
    steps = lines(folder)
    assert [m["step"] for m in steps] == [1, 2] and one_policy(steps)
    time.sleep(1)
    assert [p for node in nodes for p in node.processes() if "ray::Worker" in p] == []
    assert [list(node.home.iterdir()) for node in nodes] == [[], [], [], []]


@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_two_nodes_train_past_a_dead_engine_until_one_is_cut_off_which_ends_the_run_and_is_named(nodes: list[NamespaceNode]) -> None:
    """One TP group over both nodes, the engine on one: weights come through Ray's object store. The engine's death must not take the
    actor's rank beside it along."""
    folder = nodes[0].folder
    run = nodes[0].popen(sys.executable, "-m", "rlinf", "train", str(config(folder, 2, "0,2", "3", pp=1, steps=10_000)))
    metrics = folder / "logs" / "tiny" / "metrics.jsonl"

    def reach(step: int) -> None:
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text().count("\n") >= step):
            assert run.poll() is None and time.monotonic() < deadline, (run.kill(), run.communicate()[1][-4000:])
            time.sleep(0.5)

    reach(2)
    pid = re.search(r"rollout rank 0 of 1, node 1, .* pid (\d+)", (folder / "logs" / "tiny" / "workers" / "rollout-0.log").read_text())[1]
    nodes[1].popen("kill", "-9", pid).wait(60)
    reach(metrics.read_text().count("\n") + 3)
    assert one_policy(lines(folder)) and sum(m["rollout/engine_restarts"] for m in lines(folder)) >= 1
    nodes[1].cut_off()
    begun = time.monotonic()
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and time.monotonic() - begun < 60
    assert f"node 1 has not answered at {SUBNET}.2" in errors or "(node 1, pid" in errors, errors[-3000:]
    parts = ("/raylet/raylet ", "ray::Worker", "-m rlinf.")  # of Ray's, what has no device or memory of the run stays
    while (left := [line for line in nodes[1].processes() if any(part in line for part in parts)]) and time.monotonic() - begun < 60:
        time.sleep(0.5)
    assert left == []


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("nodes", [2], indirect=True)
def test_one_engine_over_two_nodes_until_its_scheduler_on_the_second_is_killed(nodes: list[NamespaceNode]) -> None:
    """A TP group of the actor and one of SGLang, both over both nodes; weights come by broadcast into both nodes' servers."""
    folder = nodes[0].folder
    engine = {
        "rollout__rollout_backend": "sglang", "rollout__sglang_python": find_interpreter(None, cuda=False),
        "rollout__tensor_parallel_size": 2, "rollout__weight_transport": "broadcast", "rollout__max_engine_restarts": 0,
    }  # fmt: skip
    run = nodes[0].popen(sys.executable, "-m", "rlinf", "train", str(config(folder, 2, "0,2", "1,3", pp=1, steps=10_000, **engine)))
    metrics = folder / "logs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert run.poll() is None and time.monotonic() < deadline, (run.kill(), run.communicate()[1][-4000:])
        time.sleep(0.5)
    assert one_policy(lines(folder)[:3])
    kill = "for p in /proc/[0-9]*; do if grep -q ^sglang::scheduler $p/cmdline; then kill -9 ${p#/proc/}; fi; done"
    nodes[1].popen("bash", "-c", kill).wait(60)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and "rollout_part rank 0 (node 1" in errors, errors[-3000:]
    assert "the processes of SGLang on this node ended" in errors, errors[-3000:]
