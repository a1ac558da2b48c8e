from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlinf.cluster import ray_session
from rlinf.cluster.processes import marked, new_run_id

CODE = """
import sys, tempfile
from pathlib import Path
from rlinf.cluster.cluster import Cluster
from rlinf.config.schema import ClusterConfig
from rlinf.errors import UserError

try:
    Cluster.connect(ClusterConfig(num_gpus_per_node=1, device="cpu"), sys.argv[1], Path(sys.argv[2]) / "logs")
except UserError as error:
    print(error)
"""


def test_an_object_store_that_does_not_fit_is_one_message_and_nothing_is_left(tmp_path: Path) -> None:
    """Ray itself refuses; in a process of its own, since it starts one Ray at a time."""
    run_id = new_run_id()
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as temporary:  # Ray's sockets want a short path
        env = os.environ | {"RLINF_OBJECT_STORE_BYTES": str(10**15), "RLINF_RAY_STATE": str(tmp_path / "none"), "TMPDIR": temporary}
        command = [sys.executable, "-c", CODE, run_id, str(tmp_path)]
        done = subprocess.run(command, env=env | {"RAY_ADDRESS": ""}, capture_output=True, text=True)
        left = list(Path(temporary).iterdir())
    assert done.returncode == 0, done.stderr
    assert "object store of 931322.6 GiB" in done.stdout and "--shm-size=256g" in done.stdout and "RLINF_OBJECT_STORE_BYTES" in done.stdout
    assert marked(run_id) == [] and left == []


TERMINATED = """
import os, signal, sys, time
from pathlib import Path
from rlinf.cluster.cluster import Cluster
from rlinf.cluster.processes import terminate_as_interrupt
from rlinf.config.schema import ClusterConfig

terminate_as_interrupt()
cluster = Cluster.connect(ClusterConfig(num_gpus_per_node=1, device="cpu"), sys.argv[1], Path(sys.argv[2]) / "logs")
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
except KeyboardInterrupt:
    print("nodes:", len(cluster.inventory()), cluster.failure.error)
    cluster.close()
"""


def test_a_handler_of_sigterm_that_was_there_before_ray_stays(tmp_path: Path) -> None:
    run_id = new_run_id()
    env = os.environ | {"RLINF_RAY_STATE": str(tmp_path / "none"), "RAY_ADDRESS": "", "RLINF_OBJECT_STORE_BYTES": str(200 * 2**20)}
    done = subprocess.run([sys.executable, "-c", TERMINATED, run_id, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "nodes: 1 None\n", done.stderr
    assert marked(run_id) == []


SLOW = """
import sys
from pathlib import Path
import ray
from rlinf.cluster.cluster import Cluster
from rlinf.config.schema import ClusterConfig
from rlinf.errors import RunFailed

def init(**_):
    raise Exception("The current node timed out during startup. This could happen because ...")

ray.init = init
try:
    Cluster.connect(ClusterConfig(num_gpus_per_node=1, device="cpu"), sys.argv[1], Path(sys.argv[2]) / "logs")
except RunFailed as error:
    print(error)
"""


def test_a_machine_too_busy_for_rays_own_limit_is_one_message(tmp_path: Path) -> None:
    env = os.environ | {"RLINF_RAY_STATE": str(tmp_path / "none"), "RAY_ADDRESS": "", "RLINF_OBJECT_STORE_BYTES": str(200 * 2**20)}
    done = subprocess.run([sys.executable, "-c", SLOW, new_run_id(), str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not up within the 30 s" in done.stdout and str(tmp_path / "logs" / "ray") in done.stdout


def test_a_cluster_is_joined_with_its_own_token_and_kuberays_with_the_one_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inherited RAY_AUTH_TOKEN goes before a file in Ray; KubeRay gives the token that way, with RAY_ADDRESS."""
    (tmp_path / "address").write_text("10.0.0.1:6379")
    seen: list[tuple[str | None, str | None]] = []
    joined = {"RAY_AUTH_TOKEN": "of another cluster", "RLINF_RAY_STATE": str(tmp_path)}
    for name, value in joined.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(ray_session, "listens", lambda _: True)
    monkeypatch.setattr(ray_session.RaySession, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(
        ray_session.ray, "init", lambda **_: seen.append(tuple(map(os.environ.get, ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))))
    )
    for address in ("", "10.0.0.1:6379"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        session = ray_session.RaySession("run", tmp_path)
        assert session.join()
        session.close(keep_logs=False)
        assert os.environ["RAY_AUTH_TOKEN"] == "of another cluster" and "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert seen == [(None, str(tmp_path / "token")), ("of another cluster", None)]
