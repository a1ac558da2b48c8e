"""One node of a Ray cluster: start it as head or worker, publish the head's address, stop it. What ray_utils/start_ray.sh runs.

Environment:
    RANK                       rank of this node, 0 = head; the run numbers its nodes by it
    HEAD_ADDRESS               address[:port] of the head, where ray_utils is not a shared folder (copy ray_token to the node)
    RLINF_NIC                  network interface to use; default: the one that leads to the head, or out
    RLINF_RAY_PORT             port of the head, default 6379
    RLINF_NUM_GPUS, RLINF_NUM_CPUS    devices of this node; default: its GPUs (those of CUDA_VISIBLE_DEVICES where that is set), and its
                               cores (the process slots of a CPU node)
    RLINF_OBJECT_STORE_BYTES   default: 5 % of the memory, between 512 MiB and 64 GiB, at most 0.4 of what is free in /dev/shm
    RLINF_START_TIMEOUT        seconds to wait for the head, and then for `ray start`, default 600
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
from pathlib import Path

from rlinf.cluster.head import (
    ADDRESS_FILE,
    ROOT,
    TOKEN_FILE,
    Head,
    find_head,
    publish,
    say,
    start_timeout,
    warn_of_another,
    withdraw,
    write_atomically,
    write_private,
)
from rlinf.cluster.processes import end_marked, marked
from rlinf.cluster.state import (
    GPUS_LABEL,
    RANK_LABEL,
    STORE_REMEDY,
    default_port,
    environment_with,
    join_address,
    listens,
    object_store_bytes,
    state_folder,
    token_variables,
    whole_number,
)
from rlinf.errors import UserError
from rlinf.hardware import address_of, allow_open_files, cores, free_port

MARK = "RLINF_RAY_NODE"  # in the environment of every process of the node's Ray, and of the workers inside it
TRIES = 3  # a node under load may miss one connection; whoever calls it dead ends it


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
    offer, limit = offer_options(rank), start_timeout()  # before the state folder, which would tell of a node that was never started
    state.mkdir(mode=0o700, exist_ok=True)
    if state.stat().st_uid != os.getuid():
        raise UserError(f"{state} belongs to another user: set RLINF_RAY_STATE to a folder of yours")
    if rank == 0:
        head, token = new_head(), secrets.token_hex(32)
        warn_of_another(shared, head)
        write_private(state / "token", token)
        write_private(shared / TOKEN_FILE, token)
    else:
        head = find_head(shared, state, head_address)
    mark = f"{head.cluster or 'cluster'}-{rank}-{secrets.token_hex(4)}"
    for name, value in (("mark", mark), ("rank", str(rank)), ("address", head.address)):
        (state / name).write_text(value)
    launch(rank, head, offer, state, mark, limit)
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


def offer_options(rank: int) -> list[str]:
    """What the node offers, as options of `ray start`. Raises UserError that names a variable which is no number."""
    gpus, cpus = whole_number("RLINF_NUM_GPUS", "GPUs, such as 8"), whole_number("RLINF_NUM_CPUS", "process slots, such as 8")
    gpus = visible_gpus() if gpus is None else gpus
    return [
        f"--labels={RANK_LABEL}={rank},{GPUS_LABEL}={gpus}",
        f"--num-gpus={gpus}",
        f"--num-cpus={cores() if cpus is None else cpus}",
        f"--object-store-memory={object_store_bytes()}",
    ]


def launch(rank: int, head: Head, offer: Sequence[str], state: Path, mark: str, limit: int) -> None:
    """`ray start`, which returns when the node has joined. Raises UserError when it fails, or takes longer than `limit` seconds."""
    allow_open_files()  # Ray's daemons keep the limit that they are started with, and need a file for each connection
    node_ip = head.host if rank == 0 else own_address(head.host)
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        f"--node-ip-address={node_ip}",
        *offer,
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
    with (state / "start.log").open("w") as output:
        try:
            code = subprocess.run(
                command,
                env=environment(state, mark),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
            failed = f"failed on node {rank} with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            failed = f"was not done on node {rank} within RLINF_START_TIMEOUT = {limit} s, and was ended"
    if failed:
        end_marked(mark, MARK)
        raise UserError(f"`ray start` {failed}; {last_words(state, head)}")


def last_words(state: Path, head: Head) -> str:
    """The end of what `ray start` said, and what to do. Moves the state folder, without the token, to one beside it, for Ray's logs."""
    end = "\n".join((state / "start.log").read_text(errors="replace").strip().splitlines()[-8:])
    kept = state.with_name(f"{state.name}.failed")
    (state / "token").unlink(missing_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    state.rename(kept)
    remedy = (
        "Mend what it says, then run start_ray.sh again. Ray's own logs (raylet.out, gcs_server.out) are in "
        f"{kept}/ray/session_*/logs. A firewall must let nodes reach {head.address} and the other ports of docs/cluster.md; a busy machine "
        "needs a larger RLINF_START_TIMEOUT"
    )
    if "object store" in end:
        remedy = STORE_REMEDY
    return f"its last lines:\n{end or '(none)'}\n{remedy}"


def environment(state: Path, mark: str) -> dict[str, str]:
    """For Ray's processes: the mark, and token authentication from the state folder alone.

    They end when they cannot reach the head. When it is dead, a connection breaks at once and is given up after 15 s (Ray's own setting is
    60). When the network is gone, what a raylet has sent must first be unanswered for 12 s, as in our own health checks (Ray's: 120); it
    sends something every 3 s (Ray's: a minute, when it has nothing to do).
    """
    return environment_with(
        token_variables(state / "token")
        | {
            MARK: mark,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_grpc_client_keepalive_timeout_ms": "12000",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
            "RAY_raylet_liveness_self_check_interval_ms": "3000",
        }
    )


def new_head() -> Head:
    host, port = own_address("192.0.2.1"), default_port()  # a documentation address: only its route is looked up
    if listens(join_address(host, port)):
        raise UserError(f"port {port} of {host} is taken: set RLINF_RAY_PORT on all nodes, or end what listens there")
    return Head(host, port, os.environ.get("RLINF_CLUSTER_ID") or secrets.token_hex(4), time.time())


def stop(shared: Path) -> None:
    """End everything that carries this node's mark, and nothing else."""
    state = state_folder()
    if not (state / "mark").exists():
        say("no Ray node was started here")
        return
    left = end_marked((state / "mark").read_text(), MARK, grace=10.0)
    if (state / "rank").read_text() == "0":
        withdraw(shared, (state / "address").read_text(), (state / "token").read_text())
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
        family, _, _, _, target = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            return probe.getsockname()[0]
    if nic not in (name for _, name in socket.if_nameindex()):
        raise UserError(f"RLINF_NIC={nic}: no such interface here; there are {', '.join(name for _, name in socket.if_nameindex())}")
    return address_of(nic)


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/exe").resolve().name


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
            publish(options.shared, Head.parse(options.publish, "--publish"))
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
