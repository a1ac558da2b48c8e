"""ray_utils: the block that users paste, as two nodes of this machine; what happens when things are stale, missing or lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlinf.cluster.head import ADDRESS_FILE, TOKEN_FILE, Head
from rlinf.cluster.processes import end_marked, marked, new_run_id
from rlinf.cluster.ray_node import MARK
from rlinf.config.load import ALIASES
from tests.tiny_run import lines, write_run

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
cd {checkout}/ray_utils; rm {checkout}/ray_utils/ray_head_ip.txt; export TOKENIZERS_PARALLELISM=false; bash start_ray.sh;
if [ "$RANK" -eq 0 ]; then bash check_ray.sh 128; cd {checkout};
bash examples/math/qwen2.5/run_main_math_grpo_megatron.sh grpo-1.5b-megatron;
else if [ "$RANK" -eq 1 ]; then sleep 3m; fi; sleep 10d; fi; sleep 10d
"""


@dataclass
class Node:
    """What makes this machine look like one of two: its own HOME, state folder, RANK and CPU slots; tokens of some other Ray."""

    checkout: Path
    rank: int
    port: int
    slots: int = 2
    gpus: int = 0  # that it claims to have

    @property
    def state(self) -> Path:
        return Path(f"/tmp/rlinf-t{os.getpid()}-{self.rank}")

    @property
    def home(self) -> Path:
        return self.checkout / f"home{self.rank}"

    def environment(self) -> dict[str, str]:
        foreign = self.home / ".ray" / "auth_token"  # as a ray.init() of some day before leaves it
        foreign.parent.mkdir(parents=True, exist_ok=True)
        foreign.write_text(f"{self.rank}a" * 32)
        seen = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}  # which would contradict the GPUs that a node claims
        return seen | {
            "RANK": str(self.rank), "HOME": str(self.home), "RAY_AUTH_TOKEN": f"{self.rank}b" * 32,
            "RLINF_RAY_STATE": str(self.state), "RLINF_RAY_PORT": str(self.port),
            "RLINF_NUM_CPUS": str(self.slots), "RLINF_NUM_GPUS": str(self.gpus), "RLINF_OBJECT_STORE_BYTES": "200000000",
            "RLINF_START_TIMEOUT": "60", "RLINF_TEST_NODE": str(self.rank),
            "PATH": f"{self.checkout}/stubs:{os.environ['PATH']}",
        }  # fmt: skip

    def popen(self, *command: str) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.checkout, env=self.environment(), text=True, stdout=pipe, stderr=pipe)

    def run(self, *command: str, timeout: float = 180) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=self.checkout, env=self.environment(), text=True, capture_output=True, timeout=timeout)

    def mark(self) -> str:
        return (self.state / "mark").read_text()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Two nodes that share a checkout whose ray_utils is a copy. Nothing is started."""
    shutil.copytree(ROOT / "ray_utils", tmp_path / "ray_utils", ignore=shutil.ignore_patterns("ray_*.txt", "ray_token"))
    for name in ("rlinf", "tests", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    stubs = tmp_path / "stubs" / "sleep"
    stubs.parent.mkdir()
    stubs.write_text("#!/bin/sh\n")
    stubs.chmod(0o755)
    port = random.randrange(6400, 9900)  # Ray keeps 10002 to 19999 for its workers
    pair = [Node(tmp_path, rank, port) for rank in range(2)]
    yield pair
    for node in reversed(pair):
        if (node.state / "mark").exists():
            end_marked(node.mark(), MARK, grace=1.0)
        shutil.rmtree(node.state, ignore_errors=True)


@pytest.fixture
def started(nodes: list[Node]) -> list[Node]:
    """Two nodes that are up, the second with GPUs by its own account."""
    nodes[1].gpus = 2
    for node in nodes:
        done = node.run("bash", "ray_utils/start_ray.sh")
        assert done.returncode == 0, done.stderr
    return nodes


@pytest.mark.slow
def test_the_documented_block_runs_literally_as_two_nodes(nodes: list[Node]) -> None:
    """With 64 slots on each node, which are 128 devices, and a small model under the name of the recipe; all else is as in a checkout."""
    checkout = nodes[0].checkout
    plant_recipe(checkout)
    for node in nodes:
        node.slots = 64
    block = BLOCK.format(checkout=checkout)
    (checkout / "ray_utils" / ADDRESS_FILE).write_text("192.0.2.77\nport=6379\ncluster=old\nstarted=1\n")  # an earlier run's
    blocks = [node.popen("bash", "-c", block) for node in reversed(nodes)]
    (_, other_errors), (_, errors) = [b.communicate(timeout=400) for b in blocks]
    assert "node 1 of the Ray cluster" in other_errors, other_errors
    assert "check_ray: 128 of 128 CPU slots on 2 nodes: node 0" in errors, errors
    steps = lines(checkout)
    assert [m["step"] for m in steps] == [1, 2] and all(m["train/rollout_logprob_gap_max"] <= 1e-4 for m in steps), errors
    check_ranks(nodes)
    assert [[path.name for path in node.home.iterdir()] for node in nodes] == [[".ray"], [".ray"]]
    check_token(checkout, errors + other_errors)
    check_second_calls(nodes)
    for node in reversed(nodes):
        mark = node.mark()
        assert "node stopped" in node.run("bash", "ray_utils/start_ray.sh", "--stop").stderr
        assert marked(mark, MARK) == [] and not node.state.exists()
    assert sorted(p.name for p in (checkout / "ray_utils").iterdir()) == ["check_ray.sh", "start_ray.sh"]


def plant_recipe(checkout: Path) -> None:
    """The scripts of examples/math, and the recipe that `grpo-1.5b-megatron` stands for, with a tiny model over both nodes. The
    package is copied, since it finds its recipes beside itself."""
    (checkout / "rlinf").unlink()
    shutil.copytree(ROOT / "rlinf", checkout / "rlinf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "math", checkout / "examples" / "math")
    config = write_run(
        checkout, cluster__num_nodes=2, cluster__num_gpus_per_node=2, cluster__start_timeout=300,
        cluster__component_placement={"actor": "0,2", "rollout,reward": "3"}, actor__model__pipeline_model_parallel_size=1,
        runner__max_steps=2, runner__val_check_interval=0, runner__save_interval=0,
    )  # fmt: skip
    config.rename(checkout / "examples" / "math" / "config" / f"{ALIASES['grpo-1.5b-megatron']}.yaml")


def check_ranks(nodes: list[Node]) -> None:
    """Ranks follow RANK, not Ray's order, and payloads cross."""
    checkout, run_id = nodes[0].checkout, new_run_id()
    done = nodes[0].run(sys.executable, "-m", "tests.cluster_two_nodes", str(checkout / "logs" / "ranks"), run_id)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told["totals"] == [6.0] * 4 and told["sums"] == [400_000] * 4
    assert told["node_of_rank"] == ["0", "0", "1", "1"] and told["local_ranks"] == ["0", "1", "0", "1"]
    assert told["homes"] == [str(nodes[rank].home) for rank in (0, 0, 1, 1)]
    assert marked(run_id) == []


def check_token(checkout: Path, output: str) -> None:
    """Readable by its owner only; in no log, no output, no command line."""
    token = (checkout / "ray_utils" / TOKEN_FILE).read_text()
    assert len(token) == 64 and (checkout / "ray_utils" / TOKEN_FILE).stat().st_mode & 0o777 == 0o600
    assert token not in output
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                assert token.encode() not in (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
    for log in checkout.rglob("logs/**/*"):
        assert log.is_dir() or token not in log.read_text(errors="replace")


def check_second_calls(nodes: list[Node]) -> None:
    """A second start reports; a removed address file comes back; too many devices time out naming the missing node."""
    file = nodes[0].checkout / "ray_utils" / ADDRESS_FILE
    file.unlink()
    for node in nodes:
        again = node.run("bash", "ray_utils/start_ray.sh")
        assert node.run("bash", "ray_utils/start_ray.sh", "--status").returncode == 0
        assert again.returncode == 0 and f"already up: node {node.rank} " in again.stderr
    deadline = time.monotonic() + 10
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert Head.parse(file.read_text(), "file").port == nodes[0].port
    late = nodes[0].run("bash", "ray_utils/check_ray.sh", "130", "--timeout", "1")
    assert late.returncode == 1 and "gave up after 1 s: 128 of 130 CPU slots on 2 nodes; no node has RANK 2" in late.stderr


@pytest.mark.slow
def test_a_node_that_is_lost_ends_the_run_and_is_named(started: list[Node]) -> None:
    run_id = new_run_id()
    driver = started[0].popen(sys.executable, "-m", "tests.cluster_two_nodes", str(started[0].checkout / "logs"), run_id, "wait")
    line = driver.stdout.readline()
    assert line, driver.communicate()[1]
    raylet = next(p for p in marked(started[1].mark(), MARK) if Path(f"/proc/{p}/exe").resolve().name == "raylet")
    begun = time.monotonic()
    os.kill(raylet, signal.SIGKILL)
    _, errors = driver.communicate(timeout=30)
    while marked(run_id) and time.monotonic() - begun < 30:
        time.sleep(0.2)
    assert driver.returncode == 1 and marked(run_id) == []
    assert errors.startswith("the raylet of node 1 is dead") and "(phase: training)" in errors.splitlines()[0], errors
    check = started[0].run("bash", "ray_utils/check_ray.sh", "2", "--timeout", "5")
    told = r"gave up after 5 s: 0 of 2 GPUs on 1 nodes; node 1 \(.*\) is dead; node 0 \(.*\) has no GPU and does not count\n"
    assert check.returncode == 1 and re.search(told, check.stderr), check.stderr


@pytest.mark.slow
def test_a_head_of_another_token_is_waited_out(nodes: list[Node]) -> None:
    """A token that is not the head's is what an address file of yesterday looks like beside the token of today's head. Then by IPv6."""
    checkout, (head, other) = nodes[0].checkout, nodes
    assert head.run("bash", "ray_utils/start_ray.sh").returncode == 0
    file = checkout / "ray_utils" / TOKEN_FILE
    token = file.read_text()
    file.write_text("f" * 64)
    start = other.popen("bash", "ray_utils/start_ray.sh")
    assert "does not take the token: it is another cluster's; the address is from " in start.stderr.readline()
    file.write_text(token)
    _, errors = start.communicate(timeout=120)
    assert start.returncode == 0 and "node 1 of the Ray cluster" in errors, errors
    assert other.run("bash", "ray_utils/start_ray.sh", "--stop").returncode == 0
    if Path("/proc/net/if_inet6").exists():
        done = other.run("bash", "ray_utils/start_ray.sh", f"[::1]:{head.port}")
        assert done.returncode == 0 and f"node 1 of the Ray cluster at [::1]:{head.port} is up" in done.stderr, done.stderr


@pytest.mark.slow
def test_what_listens_but_is_not_ray_is_waited_out(nodes: list[Node]) -> None:
    """At an address that another program has by now."""
    checkout = nodes[0].checkout
    with socket.create_server(("127.0.0.1", 0)) as door:
        text = Head("127.0.0.1", door.getsockname()[1]).render()
        (checkout / "ray_utils" / ADDRESS_FILE).write_text(text)
        (checkout / "ray_utils" / TOKEN_FILE).write_text("f" * 64)
        address = f"127.0.0.1:{door.getsockname()[1]}"
        done = nodes[1].run("bash", "-c", "export RLINF_START_TIMEOUT=1; bash ray_utils/start_ray.sh")
    assert done.returncode == 2 and f"what listens at {address} does not answer like Ray" in done.stderr, done.stderr


LOOK = """
from pathlib import Path
from rlinf.cluster import node_probe

node_probe.PATIENCE = 5.0
print(*node_probe.look_at_nodes(Path("/proc")), sep="\\n")
"""


@pytest.mark.slow
def test_doctor_names_a_node_that_does_not_answer(started: list[Node]) -> None:
    raylet = next(p for p in marked(started[1].mark(), MARK) if Path(f"/proc/{p}/exe").resolve().name == "raylet")
    os.kill(raylet, signal.SIGSTOP)
    try:
        done = started[0].run(sys.executable, "-c", LOOK)
    finally:
        os.kill(raylet, signal.SIGCONT)
    first, second = done.stdout.splitlines()
    assert first.startswith("NodeView(rank='0'") and first.endswith("sees=True)"), done.stdout
    assert second.startswith("SilentNode(rank='1'") and second.endswith("reason='did not answer within 5 s')"), done.stdout


def test_without_rank_nothing_is_started(nodes: list[Node]) -> None:
    done = subprocess.run(
        ["bash", "ray_utils/start_ray.sh"],
        cwd=nodes[0].checkout,
        text=True,
        capture_output=True,
        env={k: v for k, v in nodes[0].environment().items() if k != "RANK"},
    )
    assert done.returncode == 2
    assert done.stderr == "start_ray: RANK is not set: export RANK=0 on the head node, and 1, 2, ... on the others\n"


@pytest.mark.parametrize("text, expected", [
    ("127.0.0.1\nport=1\n", "nothing answers at 127.0.0.1:1 (Connection refused), from "),
    ("127.0.0.1\nport=1\ncluster=monday\n", "is of cluster monday, not of tuesday"),
    (None, "there is no "),
])  # fmt: skip
def test_a_stale_address_file_is_not_followed(nodes: list[Node], monkeypatch: pytest.MonkeyPatch, text: str | None, expected: str) -> None:
    monkeypatch.setenv("RLINF_CLUSTER_ID", "tuesday" if "not of" in expected else "")
    if text:
        (nodes[0].checkout / "ray_utils" / ADDRESS_FILE).write_text(text)
    command = "export RLINF_START_TIMEOUT=1; bash ray_utils/start_ray.sh"
    done = nodes[1].run("bash", "-c", command)
    assert done.returncode == 2
    assert "no head node within RLINF_START_TIMEOUT = 1 s: " in done.stderr and expected in done.stderr


def test_check_ray_without_a_cluster_says_so(nodes: list[Node]) -> None:
    done = nodes[0].run("bash", "ray_utils/check_ray.sh", "1")
    assert (done.returncode, done.stderr) == (2, "check_ray: no Ray cluster is up here: run start_ray.sh first\n")


def test_the_status_of_a_node_is_an_exit_code(nodes: list[Node]) -> None:
    idle = nodes[0].run("bash", "ray_utils/start_ray.sh", "--status")
    assert (idle.returncode, idle.stderr) == (0, "start_ray: no Ray node was started here\n")
    nodes[0].state.mkdir()
    for name, text in (("mark", "gone"), ("rank", "3"), ("address", "127.0.0.1:1")):
        (nodes[0].state / name).write_text(text)
    dead = nodes[0].run("bash", "ray_utils/start_ray.sh", "--status")
    assert (dead.returncode, dead.stderr) == (1, "start_ray: node 3 of the Ray cluster at 127.0.0.1:1 is dead: run start_ray.sh again\n")


def test_an_unknown_interface_is_named(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLINF_NIC", "ib99")
    done = nodes[0].run("bash", "ray_utils/start_ray.sh")
    assert done.returncode == 2 and "RLINF_NIC=ib99: no such interface here; there are lo" in done.stderr
