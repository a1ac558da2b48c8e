"""Scores of the held-out problems, kept for each problem so that two steps compare in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf.data.records import GroupHeader, Status
from rlinf.metrics.summary import Scores

MEANS = {"accuracy": "right", "boxed": "boxed", "response_length": "tokens", "truncated": "truncated", "undecided": "undecided"}


@dataclass(frozen=True)
class ValidationScores:
    """For each problem, in the order of the validation files, the mean over its answers: which share is right, has a box, is cut off, is
    undecided; and the tokens."""

    right: tuple[float, ...]
    boxed: tuple[float, ...]
    tokens: tuple[float, ...]
    truncated: tuple[float, ...]
    undecided: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {name: list(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ValidationScores:
        return cls(**{name: tuple(values) for name, values in data.items()})

    def as_scores(self) -> Scores:
        return Scores(np.array(self.right, float), np.array(self.boxed, float), np.array(self.tokens, float))


def score_validation(headers: Sequence[GroupHeader], problems: int) -> ValidationScores:
    """headers: the first group of each problem, in order, then the second of each, and so on (requests.validation_requests)."""
    of_problem = [headers[i::problems] for i in range(problems)]
    verdicts = [[v for h in groups for v in h.judged] for groups in of_problem]
    return ValidationScores(
        right=_means([[r for h in groups for r in h.right] for groups in of_problem]),
        boxed=_means([[v.extracted is not None for v in answers] for answers in verdicts]),
        tokens=_means([[n for h in groups for n in h.response_lengths] for groups in of_problem]),
        truncated=_means([[f.cut_off for h in groups for f in h.finishes] for groups in of_problem]),
        undecided=_means([[v.status is Status.UNDECIDED for v in answers] for answers in verdicts]),
    )


def validation_metrics(scores: ValidationScores, sources: Sequence[str], n: int) -> dict[str, float]:
    """Means over all problems; where these are of several files, also over those of each.

    sources: the file of each problem. n: answers to each problem; if there are several, also which share of problems has a right one.
    """
    metrics = _metrics(scores, np.ones(len(sources), dtype=bool), n)
    for name in dict.fromkeys(sources) if len(set(sources)) > 1 else ():
        metrics |= {f"{key}/{name}": value for key, value in _metrics(scores, np.array(sources) == name, n).items()}
    return metrics


def _metrics(scores: ValidationScores, chosen: np.ndarray, n: int) -> dict[str, float]:
    found = {name: np.mean(np.array(getattr(scores, field), float)[chosen]) for name, field in MEANS.items()}
    if n > 1:
        found["pass_at_n"] = np.mean(np.array(scores.right)[chosen] > 0)
    return {f"eval/{name}": float(value) for name, value in found.items()}


def _means(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(np.mean(v)) for v in values)
