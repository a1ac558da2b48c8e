"""The watchdog and the status do not wait for each other, and both end with the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from rlinf.cluster.phase import Phase
from rlinf.launch import monitor as module
from rlinf.launch.monitor import Monitor

WAIT = 20.0  # seconds; what is waited for takes some hundredths


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD", 0.01)


class Seen:
    """A watchdog and a status; `again` is set when the watchdog has looked three times."""

    def __init__(self, write: Callable[[], None] = lambda: None) -> None:
        self.write, self.looks, self.ends = write, [], []
        self.again = threading.Event()

    def look(self, *what: object) -> None:
        self.looks.append(what[:2])
        if len(self.looks) == 3:
            self.again.set()

    def end(self, error: BaseException | None) -> None:
        assert not any(t.name in ("rlinf-watchdog", "rlinf-status") for t in threading.enumerate())
        self.ends.append(error)

    def monitor(self) -> Monitor:
        return Monitor(SimpleNamespace(phase=Phase("train", 4)), SimpleNamespace(step=4), self, self)


def test_a_status_whose_folder_hangs_does_not_keep_the_watchdog_from_looking() -> None:
    released = threading.Event()
    seen = Seen(write=lambda: released.wait(WAIT) and None)
    with seen.monitor().watching():
        looked = seen.again.wait(WAIT / 2)
        released.set()
    assert looked and set(seen.looks) == {(Phase("train", 4), 4)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_status_that_cannot_be_written_does_not_end_the_watchdog() -> None:
    def refuse() -> None:
        raise RuntimeError("dictionary changed size during iteration")

    seen = Seen(refuse)
    with seen.monitor().watching():
        assert seen.again.wait(WAIT)
    assert seen.ends == [None]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError("no room")])
def test_the_status_is_told_how_the_run_ended_when_nobody_writes_it_any_more(error: BaseException | None) -> None:
    seen = Seen()

    def run() -> None:
        with seen.monitor().watching():
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert seen.ends == [error]
