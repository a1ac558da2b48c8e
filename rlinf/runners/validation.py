"""Scores of the held-out problems, one answer each, kept per problem so that two steps compare in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf.data.records import GroupHeader, Status
from rlinf.metrics.summary import Scores


@dataclass(frozen=True)
class ValidationScores:
    """Per problem, in the order of the validation files: right (0/1), boxed (0/1), response tokens, truncated (0/1), undecided (0/1)."""

    right: tuple[int, ...]
    boxed: tuple[int, ...]
    tokens: tuple[int, ...]
    truncated: tuple[int, ...]
    undecided: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {name: list(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ValidationScores:
        return cls(**{name: tuple(values) for name, values in data.items()})

    def as_scores(self) -> Scores:
        return Scores(np.array(self.right, float), np.array(self.boxed, float), np.array(self.tokens, float))


def score_validation(headers: Sequence[GroupHeader]) -> ValidationScores:
    verdicts = [h.judged[0] for h in headers]
    return ValidationScores(
        right=tuple(int(h.right[0]) for h in headers),
        boxed=tuple(int(v.extracted is not None) for v in verdicts),
        tokens=tuple(h.response_lengths[0] for h in headers),
        truncated=tuple(int(h.finishes[0].cut_off) for h in headers),
        undecided=tuple(int(v.status is Status.UNDECIDED) for v in verdicts),
    )


def validation_metrics(scores: ValidationScores) -> dict[str, float]:
    return {
        "eval/accuracy": float(np.mean(scores.right)),
        "eval/boxed": float(np.mean(scores.boxed)),
        "eval/response_length": float(np.mean(scores.tokens)),
        "eval/truncated": float(np.mean(scores.truncated)),
        "eval/undecided": float(np.mean(scores.undecided)),
    }
