"""Finds hangs. A phase that lasts too long is one: the watchdog says who is stuck, keeps the stacks of all workers, and then ends the run,
restarts it from its last checkpoint, or lets it go on (runner.on_hang).

The budget of a phase is set (runner.phase_timeout) or learned: ten times the longest such phase so far. A worker on the driver's machine
is sent a signal, to which faulthandler answers with its stacks even when Python itself is blocked; on other machines the worker's own
loop is asked.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlinf.cluster.failure import Failure
from rlinf.cluster.group import WorkerGroup
from rlinf.cluster.host import own_stacks
from rlinf.cluster.phase import Phase
from rlinf.cluster.processes import RUN_ID, carries
from rlinf.config.schema import RunnerConfig
from rlinf.errors import Hang

LEARNED, AT_LEAST = 10.0, 600.0  # a learned budget: this many times the longest such phase, and at least so many seconds
PATIENCE = 1.5  # seconds for the workers of this machine to write their stacks
FAR = 3.0  # seconds for the workers of other machines to send theirs
DEAF = 5.0  # when the driver's event loop has not turned for so many seconds, it is the driver that is stuck: it hears no answer
LOG_TAIL = 200_000  # bytes of each log in the bundle
COLLECTIVE = "distributed_c10d"  # torch's file in which a rank waits for its peers; it is named in the stacks
SHOWN = 8  # groups or ranks named in the message


class Watchdog:
    """look() is called about once a second, from a thread that does not depend on the loop.

    in_flight: group id -> the worker that has it now.
    """

    def __init__(
        self, run_dir: Path, run_id: str, runner: RunnerConfig, groups: Sequence[WorkerGroup], failure: Failure,
        in_flight: Callable[[], Mapping[str, str]],
    ) -> None:  # fmt: skip
        self.run_dir, self.run_id, self.runner = run_dir, run_id, runner
        self.groups, self.failure, self.in_flight = groups, failure, in_flight
        self.phase: Phase | None = None
        self.since = 0.0
        self.longest: dict[str, float] = {}  # name of a phase -> seconds
        self.busy: dict[tuple[str, int, str], float] = {}  # (component, rank, method) -> since when it has had such a call all the time
        self.told = False  # whether the hang of this phase was reported
        self.heard = math.inf  # when the driver's event loop last turned

    async def listen(self) -> None:
        """A task in the driver's event loop; while it is not resumed, the loop is stuck."""
        while True:
            self.heard = time.time()
            await asyncio.sleep(1.0)

    def look(self, phase: Phase, step: int, now: float) -> None:
        """Compare the phase's age with its budget; report a hang once."""
        if phase != self.phase:
            if self.phase is not None:
                self.longest[self.phase.name] = max(self.longest.get(self.phase.name, 0.0), now - self.since)
            self.phase, self.since, self.told = phase, now, False
        calls = {(g.component, rank, m) for g in self.groups for rank in range(g.size) for m, n in dict(g.in_flight[rank]).items() if n}
        self.busy = {call: self.busy.get(call, now) for call in calls}
        budget = self.budget(phase)
        if not self.told and now - self.since > budget:
            self.told = True
            self.diagnose(phase, step, budget, now)

    def budget(self, phase: Phase) -> float:
        """Seconds that the phase may take; infinite where no budget is set and none was learned yet."""
        limit = self.runner.phase_timeout
        if not phase.has_budget or limit < 0 or (limit == 0 and phase.name not in self.longest):
            return math.inf
        return float(limit) if limit else max(AT_LEAST, LEARNED * self.longest[phase.name])

    def diagnose(self, phase: Phase, step: int, budget: float, now: float) -> None:
        """Write stacks and logs to diagnosis-*.tar.gz, say who is stuck, and fail the run unless runner.on_hang is `report`."""
        lines = [f"{phase} has lasted {now - self.since:.0f} s, more than its budget of {budget:.0f} s", f"stuck: {self.stuck(now)}"]
        held = self.in_flight()
        if held:
            shown = ", ".join(f"{group} at {where}" for group, where in list(held.items())[:SHOWN])
            lines.append(f"{len(held)} groups in flight: {shown}{', ...' if len(held) > SHOWN else ''}")
        stacks = self.stacks()
        lines += who_waits_for_whom({name: text for name, text in stacks.items() if name.startswith("actor-")})
        bundle = self.run_dir / f"diagnosis-{step:06d}.tar.gz"
        try:
            pack(bundle, stacks | {"summary.txt": "\n".join([*lines, *(f"{group} {where}" for group, where in held.items())]) + "\n"})
            lines.append(f"stacks of all workers: {bundle}")
        except OSError as error:  # the disk may be what hangs
            lines.append(f"the bundle could not be written: {error}")
        message = "\n  ".join(["the run hangs:", *lines])
        if self.runner.on_hang == "report" or self.is_driver(now):  # the loop of a driver that is stuck does not get to raise the Hang
            sys.stderr.write(f"rlinf: {message}\n")
        if self.runner.on_hang != "report":  # launch.restarts decides what follows
            self.failure.report(Hang(message))

    def is_driver(self, now: float) -> bool:
        """Whether the driver is stuck, not a worker."""
        return not self.busy or now - self.heard > DEAF

    def stuck(self, now: float) -> str:
        """The component whose call has been running longest, with its ranks that have not answered; or a driver that hears no answers."""
        if not self.busy:
            return "the driver: no worker has a call to answer"
        if self.is_driver(now):
            deaf = f"its loop has not turned for {now - self.heard:.0f} s"
            return f"the driver: {deaf} (driver.txt has its stacks), and answers of workers wait for it"
        component, _, method = min(self.busy, key=self.busy.__getitem__)
        group = next(g for g in self.groups if g.component == component)
        ranks = sorted((rank, since) for (c, rank, m), since in self.busy.items() if (c, m) == (component, method))
        shown = ", ".join(f"{group.where(rank)} for {now - since:.0f} s" for rank, since in ranks[:SHOWN])
        more = ", ..." if len(ranks) > SHOWN else ""
        return f"{component} in {method}: {len(ranks)} of {group.size} ranks have not answered: {shown}{more}"

    def stacks(self) -> dict[str, str]:
        """File name -> text: the end of every worker's log, with the stacks that it has just written, and the driver's own stacks."""
        logs = self.run_dir / "workers"
        before = {path: path.stat().st_size for path in logs.glob("*.log")}
        here = {pid for g in self.groups for pid in g.pids if pid is not None and listens(pid, self.run_id)}
        for pid in here:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(PATIENCE)
        found = {path.name: end_of(path, max(size - LOG_TAIL, path.stat().st_size - 2 * LOG_TAIL)) for path, size in before.items()}
        for group in self.groups:
            far = [rank for rank, pid in enumerate(group.pids) if pid is not None and pid not in here]
            for rank, text in group.stacks(far, FAR).items() if far else ():
                name = f"{group.component}-{rank}.log"
                found[name] = found.get(name, "") + text
        return found | {"driver.txt": own_stacks()}


def listens(pid: int, run_id: str) -> bool:
    """Whether the process is on this machine, belongs to this run, and answers SIGUSR1 with its stacks; without a handler the signal
    would kill it."""
    if not carries(pid, f"{RUN_ID}={run_id}".encode()):
        return False
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def end_of(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, start))
        return file.read().decode(errors="replace")


def who_waits_for_whom(stacks: Mapping[str, str]) -> list[str]:
    """A line that names the ranks inside a collective, and those outside, for which the others wait: there the cause is to be found."""
    inside = sorted(name for name, text in stacks.items() if COLLECTIVE in text)
    outside = sorted(set(stacks) - set(inside))
    if not inside:
        return []
    if not outside:
        return [f"in a collective: {', '.join(inside)}: all of them, so the network or a peer elsewhere is stuck"]
    return [f"in a collective: {', '.join(inside)}; not in it: {', '.join(outside)}, look there first"]


def pack(path: Path, files: Mapping[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            content = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), time.time()
            archive.addfile(entry, io.BytesIO(content))
