"""The examples of docs/cluster.md for schedulers, as far as a machine without them can tell."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "cluster.md").read_text()
STUBS = {
    # srun: what follows its options, as two nodes at once; the first code that is not 0
    "bin/srun": 'echo "$@" >{here}/srun; while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 "$@" & a=$!; SLURM_NODEID=1 "$@" & '
    "wait $a; code=$?; wait; exit $code",
    "bin/sleep": "exec /bin/sleep 0.1",
    # up for as long as the head is
    "ray_utils/start_ray.sh": 'case "$1" in --status) [ -e {here}/up ];; --stop) rm -f {here}/up; echo "stop $RANK" >>{here}/said;; '
    "*) touch {here}/up;; esac",
    "ray_utils/check_ray.sh": 'echo "check $1" >>{here}/said',
    "examples/math/run_main_math_grpo_megatron.sh": "trap '/bin/sleep 0.5; echo driver stopped >>{here}/said; exit 130' TERM; "
    'echo "driver $*" >>{here}/said; while :; do /bin/sleep 0.1; done',
}


def test_a_slurm_job_that_is_told_to_end_stops_the_driver_first_and_says_how_it_ended(tmp_path: Path) -> None:
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "#SBATCH" in b]
    for name, text in STUBS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/bash\n" + text.replace("{here}", str(tmp_path)) + "\n")
        file.chmod(0o755)
    job = {"SLURM_JOB_ID": f"t{os.getpid()}", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "96"}
    env = os.environ | job | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    script = tmp_path / "job.sh"
    script.write_text(block.replace("/shared/rlinf", str(tmp_path)).replace("/tmp/rlinf-ray-", f"{tmp_path}/ray-"))
    batch = subprocess.Popen(["bash", str(script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, deadline = tmp_path / "said", time.monotonic() + 30
    while not (said.exists() and "driver" in said.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    batch.send_signal(signal.SIGTERM)
    output, _ = batch.communicate(timeout=60)
    lines = said.read_text().splitlines()
    assert lines[:3] == ["check 16", "driver qwen2.5-1.5b-grpo-megatron runner.resume_dir=auto", "driver stopped"], (lines, output)
    assert sorted(lines[3:]) == ["stop 0", "stop 1"] and batch.returncode == 130
    assert "--cpus-per-task=96 --cpu-bind=none" in (tmp_path / "srun").read_text()


def test_the_kuberay_example_is_of_this_image() -> None:
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "kind: RayJob" in b]
    cluster = yaml.safe_load(block)["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert f"ray=={cluster['rayVersion']} " in (ROOT / "requirements" / "base.txt").read_text()
    assert cluster["headGroupSpec"]["labels"] == {"rlinf-node-rank": "0"}
    assert [group for group in groups if "labels" in group["rayStartParams"]] == []  # KubeRay 1.5 refuses them there
    for pod in (group["template"]["spec"] for group in groups):
        assert f"--uid {pod['securityContext']['fsGroup']} " in (ROOT / "docker" / "Dockerfile").read_text()
        assert pod["containers"][0]["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
