"""Measures, while a run goes on, whether training first on what is done first favours short answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class TimedGroup:
    """A group that was begun. begun: when. seconds: how long it took, and length: the mean length of its responses; None while it is being
    generated."""

    begun: float
    seconds: float | None = None
    length: float | None = None


class LengthBias:
    """Compares the groups that were trained on last with those that would have been, had each waited for its turn: as many, from the same
    places of the order in which they were begun.

    window: how many, those of the last eta + 1 steps: the ledger lets no group wait longer, so the window holds all that can be overtaken.
    A group that is still being generated counts with the length that is to be expected of it (expected). Times are seconds on any clock
    that stands still while the engines do.
    """

    def __init__(self, window: int) -> None:
        self.begun: dict[str, TimedGroup] = {}  # as they were begun; the first one is the first of the window
        self.trained: deque[float] = deque(maxlen=window)  # lengths, in the order of training

    def begin(self, name: str, now: float) -> None:
        self.begun[name] = TimedGroup(now)

    def drop(self, name: str) -> None:
        """Forget a group that will not be trained on."""
        del self.begun[name]

    def finish(self, name: str, length: float, now: float) -> None:
        group = self.begun[name]
        group.seconds, group.length = now - group.begun, length

    def train(self, lengths: Sequence[float], now: float) -> float:
        """Training begins on groups of these lengths. Returns (trained - begun) / begun, of mean response lengths over the window."""
        for name in list(self.begun)[: max(0, len(self.trained) + len(lengths) - (self.trained.maxlen or 0))]:
            del self.begun[name]
        self.trained += lengths
        expected = self.expected(now)
        begun = sum(expected[name] for name in list(self.begun)[: len(self.trained)])
        return (sum(self.trained) - begun) / begun if begun else 0.0

    def expected(self, now: float) -> dict[str, float]:
        """The length of each group; of one that is being generated, the mean that is expected of groups which take longer than it has taken
        so far.

        This is the product-limit estimate (Kaplan and Meier 1958, section 2): those that are out count among those that took at least as
        long. Of what takes longer than all that have ended, it is known only that; it counts like the longest of these.
        """
        slowest_first = sorted(
            self.begun.items(), key=lambda item: (_or(item[1].seconds, now - item[1].begun), item[1].length is None), reverse=True
        )
        found, beyond = {}, max((group.length for group in self.begun.values() if group.length is not None), default=0.0)
        for at_least_as_slow, (name, group) in enumerate(slowest_first, 1):
            if group.length is not None:
                beyond += (group.length - beyond) / at_least_as_slow
            found[name] = _or(group.length, beyond)
        return found

    def state(self, now: float) -> dict[str, Any]:
        """JSON values for restore()."""
        begun = [[name, now - group.begun, group.seconds, group.length] for name, group in self.begun.items()]
        return {"begun": begun, "trained": list(self.trained)}

    def restore(self, state: Mapping[str, Any], now: float) -> None:
        self.begun = {name: TimedGroup(now - age, seconds, length) for name, age, seconds, length in state["begun"]}
        self.trained.extend(state["trained"])


def _or(known: float | None, other: float) -> float:
    return other if known is None else known
