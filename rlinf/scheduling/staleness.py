"""Which groups may be begun, and which are trained on, when engines generate ahead of the actor (AReaL, arXiv 2505.24298, section 4.1).

Pure bookkeeping. Version i is the weights after step i; B groups make a batch; eta bounds the staleness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class GroupInFlight:
    """A group that was begun and not trained on yet. born: the version of the weights when it was begun."""

    born: int
    done: bool = False


class Ledger:
    """All groups that were begun and not yet trained on, oldest first.

    A group that was begun under version v has to be trained on while the version of the weights is at most v + eta. So a later group may
    overtake an earlier one only if all groups that are left can still be trained on in time; otherwise `take` waits for the earlier one.
    Waiting is always enough, since at most (i + eta + 1) B groups are begun under versions up to i.
    """

    def __init__(self, batch_size: int, max_staleness: int) -> None:
        self.batch_size, self.eta = batch_size, max_staleness
        self.begun_and_kept = 0  # groups since the start of the run, but for those that were dropped
        self.groups: dict[str, GroupInFlight] = {}

    def room(self, version: int) -> int:
        """How many more groups may be begun now: N_r such that floor((N_r - 1) / B) <= version + eta."""
        return (version + self.eta + 1) * self.batch_size - self.begun_and_kept

    def begin(self, name: str, version: int) -> None:
        if name in self.groups:
            raise ValueError(f"group {name} is already on its way")
        self.groups[name] = GroupInFlight(version)
        self.begun_and_kept += 1

    def finish(self, name: str) -> None:
        self.groups[name].done = True

    def drop(self, name: str) -> None:
        """Forget a group that will not be trained on, as if it had never been begun. Otherwise it would use up room(), and the run would
        come to a stop."""
        del self.groups[name]
        self.begun_and_kept -= 1

    def take(self, version: int) -> list[str] | None:
        """The groups of the step that starts from `version`, in the order in which they were begun; None while they are not complete.

        These are the oldest that are done, provided that all others can then still be trained on in time.
        """
        chosen = [name for name, g in self.groups.items() if g.done][: self.batch_size]
        if len(chosen) < self.batch_size:
            return None
        left = Counter(g.born for g in self.groups.values())
        left.subtract(self.groups[name].born for name in chosen)
        waiting = 0
        for born in sorted(left):  # what was begun by then has eta - (version - born) more steps of B groups
            waiting += left[born]
            if waiting > max(0, self.eta - (version - born)) * self.batch_size:
                return None
        for name in chosen:
            del self.groups[name]
        return chosen

    def state(self) -> dict[str, Any]:
        return {"begun": self.begun_and_kept, "groups": [[name, g.born, g.done] for name, g in self.groups.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.begun_and_kept, self.groups = state["begun"], {name: GroupInFlight(born, done) for name, born, done in state["groups"]}
