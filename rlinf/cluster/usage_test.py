from __future__ import annotations

import os

import pytest

from rlinf.cluster import usage
from rlinf.cluster.phase import Phase
from rlinf.cluster.usage import Usage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the start, and seconds of CPU that one look at the memory of a process takes."""
    now, spent = [1000.0, 0.6], [0.0]

    def pss_bytes(_: int) -> int:
        spent[0] += now[1]
        return 2**30

    monkeypatch.setattr(usage, "marked", lambda _: [1])
    monkeypatch.setattr(usage, "pss_bytes", pss_bytes)
    monkeypatch.setattr(usage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(usage.time, "thread_time", lambda: spent[0])
    return now


@pytest.mark.parametrize(("seconds", "looks"), [(0.6, 2), (0.001, 60)], ids=["hundreds of GB", "a small run"])
def test_looks_at_the_memory_take_two_hundredths_of_a_core(
    seconds: float, looks: int, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes: 1.2 s a look, so one a minute."""
    clock[1], found, pss_bytes = seconds, [], usage.pss_bytes
    monkeypatch.setattr(usage, "pss_bytes", lambda pid: found.append(pid) or pss_bytes(pid))
    counted = Usage("run")
    for _ in range(60):
        counted._sample(Phase("rollout", 1))
        clock[0] += usage.INTERVAL
    assert len(found) == 2 * looks and counted.peak_pss == 2 * 2**30 and counted.peak_phase == "rollout"


def test_a_process_that_may_not_be_looked_at_counts_its_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    counted, stat = Usage("run"), usage.Path(f"/proc/{os.getpid()}/stat").read_text()
    monkeypatch.setattr(usage, "marked", lambda _: [])
    monkeypatch.setattr(usage.Path, "read_text", lambda path: refuse() if path.name == "smaps_rollup" else stat)
    counted._sample(Phase("rollout", 1))
    assert counted.peak_pss == 0 and counted.cpu_seconds["rollout"] > 0
