from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
