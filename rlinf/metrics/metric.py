"""What is said of a metric: meaning, healthy values, what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One scalar. A name with a * stands for a family of metrics."""

    name: str
    meaning: str
    healthy: str
    action: str


def metrics(section: str, *rows: tuple[str, str, str, str]) -> list[Metric]:
    return [Metric(f"{section}/{name}", *rest) for name, *rest in rows]
