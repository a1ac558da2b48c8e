"""Watches what the driver cannot see from its calls: the death of a worker that nobody is calling, of a raylet, of Ray's control store.

Ray itself reports a dead raylet after about 16 s and a dead control store after a minute; a run ends within 30 s, so this room knocks at
their ports. A refused connection is proof; silence has to last.
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
    """End this process from any thread, at once; the sentinel ends the rest of the run."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Give up when the block takes longer: a Ray that is stuck must not keep a run that is over from ending."""
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
    """A port that must answer: whose it is (for the message), and when it last did."""

    owner: str
    host: str
    port: int
    answered: float = field(default_factory=time.monotonic)
    refusals: int = 0

    def knock(self) -> str | None:
        """What is wrong, if something is."""
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
    """A worker's. forgive: the run may go on; called once, when nothing larger explains the death. False: it may not."""

    obituary: str
    forgive: Callable[[], bool]


class Health(threading.Thread):
    """`deaths` blocks for at most PERIOD seconds until a worker dies; all who have died since it was asked last."""

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
        """Return when nothing is watched any more: what ends from now on ends because we end it."""
        self.closed.set()
        if self.is_alive():
            self.join()

    def knock(self) -> str | None:
        return next((trouble for trouble in map(Door.knock, self.doors) if trouble), None)
