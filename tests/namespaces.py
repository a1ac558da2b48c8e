"""Nodes that are nodes to everything but the kernel: each has a network, a process table, a /dev/shm and a HOME of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.pretend_gpu import environment

ROOT = Path(__file__).resolve().parent.parent
SUBNET = "10.231.77"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def possible() -> bool:
    """Whether this user may make namespaces here."""
    if os.getuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"):
        return False
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(probe, capture_output=True).returncode == 0


class NamespaceNode:
    """Node `rank`: address SUBNET.(rank + 1) on eth0, at a bridge that all nodes of a test share. gpus: pretend GPUs that it has."""

    def __init__(self, rank: int, folder: Path, tag: str, port: int, gpus: int = 0) -> None:
        self.gpus = gpus
        self.rank, self.folder, self.name, self.port = rank, folder, f"{tag}n{rank}", port
        self.address, self.bridge = f"{SUBNET}.{rank + 1}", f"{tag}br"
        self.home = folder / f"home{rank}"
        self.home.mkdir()
        ip("netns", "add", self.name)
        ip("link", "add", f"{self.name}h", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", f"{self.name}h", "master", self.bridge, "up")
        for words in (
            ["addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
            ["route", "add", "default", "dev", "eth0"],
        ):
            ip("-n", self.name, *words)
        inside = "mount -t tmpfs -o size=2g tmpfs /dev/shm && exec sleep 100000"
        self.init = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.name,
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--mount-proc",
                "--kill-child",
                "bash",
                "-c",
                inside,
            ]
        )
        self.pid = self._child()

    def _child(self) -> int:
        """The first process inside, as this process sees it; once its /dev/shm is its own."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text().strip() == "sleep":
                return int(children[0])
            time.sleep(0.05)
        raise RuntimeError(f"node {self.rank} did not start")

    def popen(self, *command: str) -> subprocess.Popen:
        env = (environment(self.gpus) if self.gpus else os.environ | {"PYTHONPATH": str(ROOT)}) | {
            "RANK": str(self.rank), "HOME": str(self.home), "RLINF_RAY_STATE": f"/tmp/rlinf-{self.name}", "RLINF_RAY_PORT": str(self.port),
            "RLINF_NIC": "eth0", "RLINF_NUM_CPUS": "2", "RLINF_NUM_GPUS": str(self.gpus),
            "RLINF_OBJECT_STORE_BYTES": "150000000", "RLINF_START_TIMEOUT": "300",
        }  # fmt: skip
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", f"--wd={self.folder}"]
        return subprocess.Popen([*enter, *command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def processes(self) -> list[str]:
        """Command lines of what runs inside, beside the first process."""
        listed = subprocess.run(
            [
                "nsenter",
                "--target",
                str(self.pid),
                "--mount",
                "--pid",
                "bash",
                "-c",
                "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline 2>/dev/null; echo; done",
            ],
            capture_output=True,
            text=True,
        )
        return [line for line in listed.stdout.splitlines() if line and "sleep 100000" not in line]

    def cut_off(self) -> None:
        ip("link", "set", f"{self.name}h", "down")

    def close(self) -> None:
        self.init.kill()  # and with it everything inside
        self.init.wait()
        # The kernel takes a namespace down when its last process is gone, some time from now; the name of its link is free at once.
        subprocess.run(["ip", "link", "del", f"{self.name}h"], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)
        shutil.rmtree(f"/tmp/rlinf-{self.name}", ignore_errors=True)
