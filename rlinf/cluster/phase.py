"""What a run is doing: a phase of a step, or of its start."""

from __future__ import annotations

from dataclasses import dataclass

WORDS = {"sync_weights": "weight sync", "validate": "validation"}  # phases that people read under another name than time/<name>


@dataclass(frozen=True)
class Phase:
    """name: as in the metric time/<name>, if the phase has one. step: None before the first step.

    str() gives `step 3, rollout`, as messages and the status show it.
    """

    name: str
    step: int | None = None

    def __str__(self) -> str:
        if self.step is None:
            return f"{START}, {self.word}" if self == RESUME else self.word
        return f"step {self.step}, {self.word}"

    @property
    def word(self) -> str:
        """The name as people read it, without the step."""
        return WORDS.get(self.name, self.name)

    @property
    def has_budget(self) -> bool:
        """Whether the watchdog limits how long it may take; the start has cluster.start_timeout instead."""
        return self != START


START = Phase("start")  # the workers come up
RESUME = Phase("resume")  # they load a checkpoint; it has a budget, since a folder on the network may hang
