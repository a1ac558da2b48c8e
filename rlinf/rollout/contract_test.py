"""What an engine counts is told once, whoever counts it."""

import math
from threading import Thread

from rlinf.rollout.contract import Counters, EngineStats


def test_each_call_tells_what_was_counted_since_the_last() -> None:
    counters = Counters()
    counters.add(decoded_tokens=3, busy_seconds=0.5)
    counters.add(decoded_tokens=4, truncated_mass=math.nan)
    first = counters.since_last()
    assert (first.decoded_tokens, first.busy_seconds) == (7, 0.5) and math.isnan(first.truncated_mass)
    counters.add(reused_tokens=2)
    assert counters.since_last() == EngineStats(reused_tokens=2)  # the mass that is not known was told, and is no longer


def test_nothing_is_lost_between_the_thread_that_counts_and_the_one_that_asks() -> None:
    counters = Counters()
    engine = Thread(target=lambda: [counters.add(decoded_tokens=1) for _ in range(20_000)])
    engine.start()
    told = 0
    while engine.is_alive():
        told += counters.since_last().decoded_tokens
    assert told + counters.since_last().decoded_tokens == 20_000
