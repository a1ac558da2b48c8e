"""samples/tokens_NNNNNN.jsonl: what training computed for each sample, a line a sample, for people who look into a run.

Every line has the sample's advantage, the gap between actor and engine, and the importance ratio. For a few samples of a step (the highest
and the lowest advantage, the largest gap, some at random) it also has the tokens with three values each. A value takes one byte, so that
the file stays small.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlinf.data.records import GroupHeader

RANDOM_SAMPLES = 4
SMALLEST, DECADES, LEVELS = 1e-6, 7.0, 127  # a byte holds 1e-6 to 10 of either sign in steps of 14 %; 0 below that
UNKNOWN = -128


@dataclass(frozen=True)
class DumpPlan:
    """The file for one step, and the samples that are written with their tokens (besides the one with the largest gap, found later)."""

    path: str
    sample_ids: frozenset[str]


def plan_dump(
    path: str, headers: Sequence[GroupHeader], advantages: Sequence[np.ndarray], trained: Sequence[np.ndarray], seed: tuple[int, ...]
) -> DumpPlan:
    """Choose the samples to write with their tokens: the highest advantage, the lowest, and RANDOM_SAMPLES others.

    trained: for each group which samples are trained on (bool); the others get no line.
    """
    names = [name for h, those in zip(headers, trained, strict=True) for name, is_in in zip(h.sample_ids, those, strict=True) if is_in]
    if not names:
        return DumpPlan(path, frozenset())
    flat = np.concatenate([np.asarray(a, float)[those] for a, those in zip(advantages, trained, strict=True)])
    chosen = {names[int(flat.argmax())], names[int(flat.argmin())]}
    chosen |= {names[k] for k in np.random.default_rng(seed).permutation(len(names))[:RANDOM_SAMPLES]}
    return DumpPlan(path, frozenset(chosen))


@dataclass(frozen=True)
class TokenValues:
    """The values of one sample, [T] each, NaN where a token is not in the loss.

    advantages    of each token
    log_ratios    log π/π_old, before the optimizer step
    gaps          log π_old - log μ: the actor against the rollout engine
    """

    sample_id: str
    advantages: np.ndarray
    log_ratios: np.ndarray
    gaps: np.ndarray

    @property
    def largest_gap(self) -> float:
        known = np.abs(self.gaps[~np.isnan(self.gaps)])
        return float(known.max()) if known.size else 0.0

    def line(self, pieces: Sequence[str] | None = None) -> str:
        """pieces: the text of each token; without them only the sample's own numbers are written."""
        gaps, ratios = np.abs(self.gaps), np.exp(self.log_ratios)
        numbers = {"advantage": mean(self.advantages), "gap_mean": mean(gaps), "gap_max": self.largest_gap, "ratio_mean": mean(ratios)}
        row: dict[str, object] = {"sample_id": self.sample_id} | {k: short(v) for k, v in numbers.items()}
        if pieces is not None:
            arrays = {"advantages": self.advantages, "log_ratios": self.log_ratios, "gaps": self.gaps}
            row |= {"pieces": list(pieces)} | {name: encode(values) for name, values in arrays.items()}
        return json.dumps(row, ensure_ascii=False, allow_nan=False)


def mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def encode(values: np.ndarray) -> str:
    """The values as signed bytes on a logarithmic scale, in base64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        level = 1 + np.log10(np.abs(values) / SMALLEST) * (LEVELS - 1) / DECADES
    code = np.where(level < 1, 0, np.clip(np.rint(level), 1, LEVELS)) * np.sign(values)
    return base64.b64encode(np.where(np.isnan(values), UNKNOWN, code).astype(np.int8).tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """The values that encode() was given, to within half a step of its scale."""
    code = np.frombuffer(base64.b64decode(text), np.int8).astype(float)
    size = SMALLEST * 10 ** ((np.abs(code) - 1) * DECADES / (LEVELS - 1))
    return np.where(code == UNKNOWN, np.nan, np.where(code == 0, 0.0, np.sign(code) * size))
