"""The progress line that people watch, one for each step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console

FIELDS = (  # label, metric, format
    ("reward", "rollout/rewards", "+.2f"),
    ("accuracy", "rollout/accuracy", ".3f"),
    ("length", "rollout/response_length", ".1f"),
    ("entropy", "train/entropy_loss", ".3f"),
    ("loss", "sft/loss", ".4f"),
    ("held-out loss", "sft/val_loss", ".4f"),
    ("tokens/s", "perf/tokens_per_second", ",.0f"),
)

WARNINGS = (  # label, metric, format, shown above this
    ("skipped", "train/minibatches_skipped", ".0f", 0.0),
    ("undecided", "rollout/verdict_undecided", ".0%", 0.2),
    ("own parts failed", "rollout/own_parts_failed", ".0%", 0.0),
)


class Progress:
    """Writes `step i/n  reward ..  accuracy ..  length ..  entropy ..  tokens/s ..  ETA ..` to a terminal or a log file.

    first_step: the first step of this process (after a resume, the one after the checkpoint): the ETA is the mean of its own steps.
    """

    def __init__(
        self, total_steps: int, first_step: int = 1, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total_steps, self.first_step, self.clock = total_steps, first_step, clock
        self.console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False, markup=True)
        self.started = clock()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        fields = [f"{label} {metrics[name]:{form}}" for label, name, form in FIELDS if name in metrics]
        fields += [
            f"[yellow]{label} {metrics[name]:{form}}[/yellow]" for label, name, form, above in WARNINGS if metrics.get(name, 0.0) > above
        ]
        mean = (self.clock() - self.started) / (step - self.first_step + 1)
        fields.append(f"ETA {duration(mean * (self.total_steps - step))}")
        self.console.print(f"[bold]step {step}/{self.total_steps}[/bold]  " + "  ".join(fields))


def duration(seconds: float) -> str:
    """Seconds as 1:05:09, 5:09 or 0:09."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
