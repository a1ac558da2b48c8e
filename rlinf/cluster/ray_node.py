"""One node of a Ray cluster: start it as head or worker, publish the head's address, stop it. What ray_utils/start_ray.sh runs.

Environment:
    RANK                       rank of this node, 0 = head; the run numbers its nodes by it
    HEAD_ADDRESS               address[:port] of the head, where ray_utils is not a shared folder (copy ray_token to the node)
    RLINF_NIC                  network interface to use; default: the one that leads to the head, or out
    RLINF_RAY_PORT             port of the head, default 6379
    RLINF_NUM_GPUS, RLINF_NUM_CPUS    devices of this node; default: its GPUs (those of CUDA_VISIBLE_DEVICES where that is set), and its
                               cores (the process slots of a CPU node)
    RLINF_OBJECT_STORE_BYTES   default: 5 % of the memory, between 512 MiB and 64 GiB, at most 0.4 of what is free in /dev/shm
    RLINF_START_TIMEOUT        seconds to wait for the head, default 600
    RLINF_CLUSTER_ID           same on all nodes: an address file with another id is not this cluster's
    RLINF_RAY_STATE            folder of this node's state, default /tmp/rlinf-ray-<user id>
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlinf.cluster.processes import end_marked, marked
from rlinf.cluster.state import STORE_REMEDY, listens, object_store_bytes, port_number, state_folder, whole_number
from rlinf.errors import UserError
from rlinf.hardware import address_of, allow_open_files, cores, free_port

MARK = "RLINF_RAY_NODE"  # in the environment of every process of the node's Ray, and of the workers inside it
ROOT = Path(__file__).resolve().parent.parent.parent
ADDRESS_FILE, TOKEN_FILE = "ray_head_ip.txt", "ray_token"
TRIES = 3  # a node under load may miss one connection; whoever calls it dead ends it


@dataclass(frozen=True)
class Head:
    """Where the head is. In the shared file: the address alone on the first line, then `name=value` lines."""

    host: str
    port: int
    cluster: str = ""
    started: float = 0.0

    @staticmethod
    def parse(text: str) -> Head:
        first, *rest = text.split()
        values = dict(line.split("=", 1) for line in rest)
        return Head(first, int(values.get("port", default_port())), values.get("cluster", ""), float(values.get("started", 0)))

    def render(self) -> str:
        return f"{self.host}\nport={self.port}\ncluster={self.cluster}\nstarted={self.started:.3f}\n"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def default_port() -> int:
    return port_number(os.environ.get("RLINF_RAY_PORT") or "6379", "RLINF_RAY_PORT")


def own_rank() -> int:
    """The variable RANK as a number. Raises UserError when it is not one."""
    rank = os.environ.get("RANK", "")
    if not (rank.isascii() and rank.isdecimal()):
        raise UserError(f"RANK is {repr(rank) if rank else 'not set'}: export RANK=0 on the head node, and 1, 2, ... on the others")
    return int(rank)


def start(shared: Path, head_address: str | None) -> None:
    """Start this node's Ray, unless it is up already."""
    rank, state = own_rank(), state_folder()
    if (state / "mark").exists():
        address, mark = (state / "address").read_text(), (state / "mark").read_text()
        if lives(address, mark):
            say(f"already up: node {(state / 'rank').read_text()} of the Ray cluster at {address} (start_ray.sh --stop ends it)")
            return
        stop(shared)  # what is left of a cluster that is dead
    resources = resource_options()  # before the state folder, which would tell of a node that was never started
    state.mkdir(mode=0o700, exist_ok=True)
    if state.stat().st_uid != os.getuid():
        raise UserError(f"{state} belongs to another user: set RLINF_RAY_STATE to a folder of yours")
    head = new_head() if rank == 0 else find_head(shared, head_address)
    if rank == 0:
        write_private(shared / TOKEN_FILE, secrets.token_hex(32))
    write_private(state / "token", (shared / TOKEN_FILE).read_text())
    mark = f"{head.cluster or 'cluster'}-{rank}-{secrets.token_hex(4)}"
    for name, value in (("mark", mark), ("rank", str(rank)), ("address", head.address)):
        (state / name).write_text(value)
    launch(rank, head, resources, state, mark)
    if rank == 0:
        write_atomically(shared / ADDRESS_FILE, head.render())
        command = [sys.executable, "-m", "rlinf.cluster.ray_node", str(shared), "--publish", head.render()]
        subprocess.Popen(
            command,
            env=environment(state, mark),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    say(f"node {rank} of the Ray cluster at {head.address} is up")


def resource_options() -> list[str]:
    """What the node offers, as options of `ray start`. Raises UserError that names a variable which is no number."""
    gpus, cpus = whole_number("RLINF_NUM_GPUS", "GPUs, such as 8"), whole_number("RLINF_NUM_CPUS", "process slots, such as 8")
    return [
        f"--num-gpus={visible_gpus() if gpus is None else gpus}",
        f"--num-cpus={cores() if cpus is None else cpus}",
        f"--object-store-memory={object_store_bytes()}",
    ]


def launch(rank: int, head: Head, resources: Sequence[str], state: Path, mark: str) -> None:
    """`ray start`, which returns when the node has joined."""
    allow_open_files()  # Ray's daemons keep the limit that they are started with, and need a file for each connection
    node_ip = head.host if rank == 0 else own_address(head.host)
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        f"--node-ip-address={node_ip}",
        *resources,
        f"--labels=rlinf-node-rank={rank}",
        "--disable-usage-stats",
    ]
    if rank == 0:
        command += [
            "--head",
            f"--port={head.port}",
            f"--ray-client-server-port={free_port(node_ip)}",
            "--include-dashboard=false",
            f"--temp-dir={state / 'ray'}",
        ]
    else:
        command += [f"--address={head.address}", f"--temp-dir={state / 'ray'}"]
    done = subprocess.run(
        command,
        env=environment(state, mark),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        end_marked(mark, MARK)
        shutil.rmtree(state)
        end = "\n".join(done.stdout.strip().splitlines()[-8:])
        remedy = STORE_REMEDY if "object store" in end else "Mend what it says, then run start_ray.sh again"
        raise UserError(f"`ray start` failed on node {rank} with exit code {done.returncode}:\n{end}\n{remedy}")


def environment(state: Path, mark: str) -> dict[str, str]:
    """For Ray's processes: the mark, token authentication from the state folder, an end within 20 s when the head is gone."""
    return os.environ | {
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    }


def new_head() -> Head:
    host, port = own_address("192.0.2.1"), default_port()  # a documentation address: only its route is looked up
    if listens(f"{host}:{port}"):
        raise UserError(f"port {port} of {host} is taken: set RLINF_RAY_PORT on all nodes, or end what listens there")
    return Head(host, port, os.environ.get("RLINF_CLUSTER_ID") or secrets.token_hex(4), time.time())


def find_head(shared: Path, head_address: str | None) -> Head:
    """The head, once it answers; UserError that says what was seen instead at the time-out."""
    seconds = whole_number("RLINF_START_TIMEOUT", "seconds, such as 600")
    timeout = 600 if seconds is None else seconds
    given = head_address or os.environ.get("HEAD_ADDRESS")
    deadline, seen, told = time.monotonic() + timeout, "", 0.0
    while time.monotonic() < deadline:
        head, seen = look_for_head(shared, given)
        if head:
            return head
        if time.monotonic() - told > 30:
            say(f"waiting for the head: {seen}")
            told = time.monotonic()
        time.sleep(1.0)
    raise UserError(f"no head node within RLINF_START_TIMEOUT = {timeout} s: {seen}. Run start_ray.sh with RANK=0 on the head node")


def look_for_head(shared: Path, given: str | None) -> tuple[Head | None, str]:
    """(the head, or None; what was seen instead)."""
    file, wanted = shared / ADDRESS_FILE, os.environ.get("RLINF_CLUSTER_ID")
    if given:
        host, _, port = given.partition(":")
        head, source = Head(host, port_number(port, f"HEAD_ADDRESS {given}") if port else default_port()), "HEAD_ADDRESS"
    elif (text := text_of(file)).strip():
        head, source = Head.parse(text), str(file)
        if wanted and head.cluster != wanted:
            return None, f"{file} is of cluster {head.cluster or '(no id)'}, not of {wanted}"
    else:
        return None, f"there is no {file}"
    if not listens(head.address):
        return None, f"nothing answers at {head.address} (from {source})"
    if not (shared / TOKEN_FILE).exists():
        return None, f"there is no {shared / TOKEN_FILE}; copy it from the head node"
    return head, ""


def text_of(file: Path) -> str:
    """Empty when it is not there; another node may remove it at any moment."""
    with suppress(FileNotFoundError):
        return file.read_text()
    return ""


def publish(shared: Path, head: Head) -> None:
    """For as long as the head lives, write the address file again whenever somebody has removed it; stop when a newer head has written its
    own."""
    missed = 0
    while missed < 10:
        missed = 0 if listens(head.address) else missed + 1
        file = shared / ADDRESS_FILE
        text = text_of(file)
        if text.strip() and Head.parse(text).started > head.started:
            return
        if text != head.render():
            write_atomically(file, head.render())
        time.sleep(1.0)


def stop(shared: Path) -> None:
    """End everything that carries this node's mark, and nothing else."""
    state = state_folder()
    if not (state / "mark").exists():
        say("no Ray node was started here")
        return
    left = end_marked((state / "mark").read_text(), MARK, grace=10.0)
    file, address = shared / ADDRESS_FILE, (state / "address").read_text()
    if (state / "rank").read_text() == "0":
        if (text := text_of(file)).strip() and Head.parse(text).address == address:
            file.unlink(missing_ok=True)
            (shared / TOKEN_FILE).unlink(missing_ok=True)
    shutil.rmtree(state)
    say(f"node stopped; still running: {left}" if left else "node stopped")


def status() -> bool:
    """Whether the Ray that was started here is alive, for health checks of containers; also True when none was started."""
    state = state_folder()
    if not (state / "mark").exists():
        say("no Ray node was started here")
        return True
    address, rank = (state / "address").read_text(), (state / "rank").read_text()
    alive = lives(address, (state / "mark").read_text())
    say(f"node {rank} of the Ray cluster at {address} " + ("is up" if alive else "is dead: run start_ray.sh again"))
    return alive


def lives(address: str, mark: str) -> bool:
    """Whether the raylet that was started here runs, and its head answers one of TRIES attempts."""
    return any(name_of(pid) == "raylet" for pid in marked(mark, MARK)) and any(listens(address) for _ in range(TRIES))


def visible_gpus(driver: Path = Path("/proc/driver/nvidia/gpus"), devices: Path = Path("/dev")) -> int:
    """How many GPUs the processes of this node may see; Ray refuses to offer more. A container may show all GPUs of its host in /proc, but
    have the device files of only some."""
    there = min(sum(1 for _ in driver.glob("*")), sum(1 for _ in devices.glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None or not there else len([name for name in visible.split(",") if name not in ("", "-1", "NoDevFiles")])


def own_address(towards: str) -> str:
    """This node's address on RLINF_NIC, or else on the interface that leads towards a host."""
    nic = os.environ.get("RLINF_NIC")
    if not nic:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, 9))  # sends nothing
            return probe.getsockname()[0]
    if nic not in (name for _, name in socket.if_nameindex()):
        raise UserError(f"RLINF_NIC={nic}: no such interface here; there are {', '.join(name for _, name in socket.if_nameindex())}")
    return address_of(nic)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/exe").resolve().name


def write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.rename(path)


def say(line: str) -> None:
    sys.stderr.write(f"start_ray: {line}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="start_ray.sh", description="Start this node's Ray: the head where RANK=0, a worker elsewhere.")
    parser.add_argument("shared", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("head_address", nargs="?", help="address[:port] of the head, instead of the shared file ray_head_ip.txt")
    parser.add_argument("--stop", action="store_true", help="end the Ray that was started here, and nothing else")
    parser.add_argument("--status", action="store_true", help="exit code 1 if the Ray that was started here has died")
    parser.add_argument("--publish", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.publish:
            publish(options.shared, Head.parse(options.publish))
        elif options.status:
            return 0 if status() else 1
        elif options.stop:
            stop(options.shared)
        else:
            start(options.shared, options.head_address)
    except UserError as error:
        say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
