"""The processes of a run: every one carries the run's id in its environment, so that none is ever left behind.

Three things end them: a clean close (end_run), the kernel when a parent dies (die_with_parent), and a sentinel, a small process on
each node that outlives what it watches (the driver, or all workers of the node) and then ends whatever still carries the id. Linux only:
/proc and prctl.

    python -I -S processes.py RUN_ID driver|parent WATCHED_PID WATCHED_START_TIME [FOLDER ...]        (the sentinel)
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN_ID = "RLINF_RUN_ID"
PR_SET_PDEATHSIG = 1


def new_run_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies. parent: the pid that the parent should have; if it has already died, exit
    now."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def terminate_as_interrupt() -> None:
    """From now on SIGTERM, which schedulers send, ends this program like Ctrl-C; also in the background of a script, where the shell makes
    programs ignore SIGINT."""

    def stop(*_: object) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, stop)


def start_time(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot; together with the pid it identifies a process. None when it is dead or a
    zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def parents() -> dict[int, int]:
    """Parent of every living process."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] not in "ZX":
                found[int(entry)] = int(fields[1])
    return found


def carries(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def marked(value: str, variable: str = RUN_ID, by: int | None = None) -> list[int]:
    """Living processes of this machine that were started with variable=value, and their descendants; not this process nor its ancestors.

    by: a start time; without those that were started after it.
    """
    tree = parents()
    mark = f"{variable}={value}".encode()
    found = {pid for pid in tree if carries(pid, mark)}
    grew = True
    while grew:
        children = {pid for pid, parent in tree.items() if parent in found} - found
        found |= children
        grew = bool(children)
    pid = os.getpid()
    while pid in tree:
        found.discard(pid)
        pid = tree[pid]
    return sorted(pid for pid in found if by is None or (start_time(pid) or 0) <= by)


def end_marked(value: str, variable: str = RUN_ID, grace: float = 3.0, by: int | None = None) -> list[int]:
    """Terminate, then kill, every process that `marked` finds. Returns those that are still alive (uninterruptible ones)."""
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + seconds
        told: set[int] = set()
        while alive := marked(value, variable, by):
            for pid in set(alive) - told:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            told.update(alive)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if not alive:
            return []
    return alive


def end_run(run_id: str, grace: float = 3.0, by: int | None = None) -> list[int]:
    """End every process of the run on this machine, or those started `by` then, and remove its shared memory. Returns the pids that could
    not be ended."""
    left = end_marked(run_id, grace=grace, by=by)
    for segment in Path("/dev/shm").glob(f"*{run_id}*"):
        shutil.rmtree(segment) if segment.is_dir() else segment.unlink(missing_ok=True)
    return left


def start_sentinel(run_id: str, folders: tuple[Path, ...] = ()) -> subprocess.Popen:
    """A process of its own session that waits for the end of this one, then ends the run on this machine and removes `folders`."""
    return _start_sentinel(run_id, "driver", os.getpid(), folders)


def dismiss(sentinel: subprocess.Popen) -> None:
    """End the sentinel of a run that has ended. By its pid: one that has only just been started may not show yet whose it is."""
    sentinel.kill()
    sentinel.wait()


def start_node_sentinel(run_id: str) -> subprocess.Popen:
    """A process that waits until no child of this one's parent (the raylet) is a worker of the run any more, and then ends what they left
    behind. One worker may die alone: an engine is started anew, and the others go on."""
    return _start_sentinel(run_id, "parent", os.getppid(), ())


def _start_sentinel(run_id: str, kind: str, watched: int, folders: tuple[Path, ...]) -> subprocess.Popen:
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), run_id, kind, str(watched), str(start_time(watched))]
    return subprocess.Popen(
        [*command, *map(str, folders)],
        env={RUN_ID: run_id},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def has_workers(raylet: int, run_id: str) -> bool:
    mark = f"{RUN_ID}={run_id}".encode()
    return any(parent == raylet and carries(pid, mark) for pid, parent in parents().items())


def sentinel(run_id: str, kind: str, watched: int, started: int, folders: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while start_time(watched) == started and (kind == "driver" or has_workers(watched, run_id)):
        time.sleep(0.5)
    # An engine that was alone on its node may be on its way back already: a worker's sentinel ends what was there before.
    now = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
    end_run(run_id, by=now if kind == "parent" else None)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sentinel(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
