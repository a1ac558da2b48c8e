"""The table at the end of a run: held-out scores before and after, with confidence intervals. Legend: N problems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

RESAMPLES = 10_000
CHUNK = 500
Z95 = 1.959963984540054


class Interval(NamedTuple):
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """One evaluation, a number for each problem: score (1 = right, or the share right of several samples), boxed (share of
    responses with an answer box), tokens (mean response length)."""

    score_N: np.ndarray
    boxed_N: np.ndarray
    tokens_N: np.ndarray


def paired_gain(before_N: np.ndarray, after_N: np.ndarray, seed: int = 0) -> Interval:
    """Mean of after - before over the same problems in the same order; percentile bootstrap over problems, 10,000 resamples, seeded."""
    if before_N.shape != after_N.shape or before_N.ndim != 1 or not len(before_N):
        raise ValueError(f"paired problems needed, got {before_N.shape} and {after_N.shape}")
    gain_N = after_N.astype(np.float64) - before_N
    rng = np.random.default_rng(seed)
    means = np.concatenate([gain_N[rng.integers(0, len(gain_N), (CHUNK, len(gain_N)))].mean(axis=1) for _ in range(RESAMPLES // CHUNK)])
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(gain_N.mean()), float(low), float(high))


def wilson(successes: float, n: int) -> Interval:
    """A proportion with Wilson's 95 % interval (E. B. Wilson 1927). Of nothing: NaN, between 0 and 1."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, min(max(0.0, centre - half), p), max(min(1.0, centre + half), p))


def before_after_table(before: Scores, after: Scores) -> Table:
    """Accuracy and format rate in percent, gain in points, mean response length."""
    table = Table(
        title=f"{len(before.score_N)} held-out problems, 95 % confidence intervals", box=SIMPLE_HEAD, pad_edge=False
    )  # fits 80 columns
    for column in ("", "before", "after", "gain"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, old_N, new_N in (("accuracy %", before.score_N, after.score_N), ("boxed %", before.boxed_N, after.boxed_N)):
        cells = [percent(wilson(float(x.sum()), len(x))) for x in (old_N, new_N)]
        table.add_row(name, *cells, percent(paired_gain(old_N, new_N), sign=True))
    gain = paired_gain(before.tokens_N, after.tokens_N)
    table.add_row(
        "length",
        f"{before.tokens_N.mean():.1f}",
        f"{after.tokens_N.mean():.1f}",
        f"{gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]",
    )
    return table


def percent(interval: Interval, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    value, low, high = (format(100 * x, form) for x in interval)
    return f"{value} [{low}, {high}]"


def show_summary(before: Scores, after: Scores, output_dir: str, console: Console | None = None) -> None:
    """Print the table, and the command that shows the curves."""
    console = console or Console(stderr=True)
    console.print(before_after_table(before, after))
    console.print(f"curves: tensorboard --logdir {output_dir} --port 6006", soft_wrap=True, markup=False, highlight=False)
