"""Watches for what the driver's calls cannot show: the death of a worker that is not being called, of a raylet, of Ray's control store.

Ray itself reports a dead raylet after about 16 s and a dead control store after a minute. A run is to end within 30 s, so this module
probes their ports. A refused connection is proof of a death; silence only when it lasts.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlinf.cluster.failure import Failure
from rlinf.cluster.phase import Phase
from rlinf.errors import RunFailed

PERIOD = 0.5  # seconds between rounds
SILENCE = 12.0  # seconds without an answer before a machine counts as lost
PATIENCE = 20.0  # seconds from a failure to close(), and for close() itself; what does not let go is then ended with the process


def give_up(message: str, code: int = 1) -> None:
    """End this process at once, from any thread; the sentinel then ends the rest of the run."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Call give_up() when the block takes longer than that: a Ray that is stuck must not keep a finished run from ending."""
    code = 130 if isinstance(sys.exc_info()[1], KeyboardInterrupt) else 1
    timer = threading.Timer(seconds, give_up, (f"{what} took longer than {seconds:g} s; ending the process.", code))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass
class Door:
    """A port that must answer. It knows whose port it is (for messages), and when it last answered."""

    owner: str
    host: str
    port: int
    answered: float = field(default_factory=time.monotonic)
    refusals: int = 0

    def knock(self) -> str | None:
        """What is wrong with the port, or None."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect((self.host, self.port))
            except ConnectionRefusedError:
                self.refusals += 1
                return f"{self.owner} is dead: nothing listens at {self.host}:{self.port}" if self.refusals > 1 else None
            except OSError as error:
                silent = time.monotonic() - self.answered
                return f"{self.owner} has not answered at {self.host}:{self.port} for {silent:.0f} s: {error}" if silent > SILENCE else None
        self.answered, self.refusals = time.monotonic(), 0
        return None


@dataclass(frozen=True)
class Death:
    """The death of a worker. forgive: called once, when nothing larger explains the death; returns whether the run may go on."""

    obituary: str
    forgive: Callable[[], bool]


class Health(threading.Thread):
    """Watches ports and workers in a thread. `deaths` blocks for at most PERIOD seconds until a worker dies, and returns all that have died
    since its last call."""

    def __init__(self, doors: list[Door], deaths: Callable[[], list[Death]], failure: Failure, phase: Callable[[], Phase]) -> None:
        super().__init__(name="rlinf-health", daemon=True)
        self.doors, self.deaths, self.failure, self.phase = doors, deaths, failure, phase
        self.closed = threading.Event()

    def run(self) -> None:
        while not self.closed.is_set() and self.failure.error is None:
            deaths = self.deaths()
            cause = self.knock()
            if deaths and not cause:
                self.closed.wait(PERIOD)  # a worker dies with its raylet: ask again whether that is the reason
                cause = self.knock()
            if self.closed.is_set():
                break
            if cause:
                self.failure.report(RunFailed(f"{cause} (phase: {self.phase()})"))
            elif fatal := [death for death in deaths if not death.forgive()]:
                self.failure.report(RunFailed(fatal[0].obituary))
        if not self.closed.wait(PATIENCE):
            give_up(f"{self.failure.error}\nThe loop did not end within {PATIENCE:.0f} s of this failure; ending the process.")

    def stop(self) -> None:
        """Stop watching; returns when it has stopped. Processes that end later end because the run ends them."""
        self.closed.set()
        if self.is_alive():
            self.join()

    def knock(self) -> str | None:
        return next((trouble for trouble in map(Door.knock, self.doors) if trouble), None)
