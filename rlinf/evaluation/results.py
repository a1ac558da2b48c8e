"""Computes scores with intervals from samples.jsonl, and tables, curves and comparisons from scores. Legend: N problems, n samples of each.

Scores are computed from the dump alone, so an interrupted evaluation gives the same scores as one that was not interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from rlinf.data.records import Finish, Status
from rlinf.errors import UserError
from rlinf.evaluation.folder import read_rows
from rlinf.evaluation.metrics import RIGHT, TAUS, draw_sizes, g_pass_at_k, maj_at_k, mg_pass_at_k, pass_at_k, stability_size
from rlinf.evaluation.statistics import bootstrap_means, is_proportion, paired_p_value
from rlinf.metrics.summary import Interval, paired_gain, percent, wilson
from rlinf.rewards.tasks import name_of

CUT = [finish.value for finish in Finish if finish.cut_off]


@dataclass(frozen=True)
class Tally:
    """The samples of one set as arrays [N, n]. votes names each answer (RIGHT, None = no answer)."""

    problems: tuple[str, ...]
    right: np.ndarray
    no_box: np.ndarray
    undecided: np.ndarray
    truncated: np.ndarray
    tokens: np.ndarray
    votes: tuple[tuple[Hashable | None, ...], ...]

    @property
    def n(self) -> int:
        return self.right.shape[1]

    @property
    def accuracy_N(self) -> np.ndarray:
        return self.right.mean(axis=1)


@dataclass(frozen=True)
class SetResult:
    """The scores of one model on one benchmark. step: of the checkpoint (0 for a plain model folder). series: the run to which it
    belongs."""

    model: str
    series: str
    step: int
    benchmark: str
    tally: Tally
    scores: dict[str, Interval]


def read_tally(samples: Path, problems: Sequence[str], n: int) -> Tally:
    """The samples of a dump. Raises UserError unless it has samples 0..n-1 of every problem, once each."""
    place = {problem: i for i, problem in enumerate(problems)}
    rows: list[list[dict[str, Any] | None]] = [[None] * n for _ in problems]
    for row in read_rows(samples):
        i, k = place.get(row["problem"]), row["sample"]
        if i is None or not 0 <= k < n or rows[i][k] is not None:
            raise UserError(f"{samples}: sample {k} of problem {row['problem']} does not belong there; the file was changed by hand")
        rows[i][k] = row
    full = [[row for row in of_problem if row is not None] for of_problem in rows]
    missing = sum(n - len(of_problem) for of_problem in full)
    if missing:
        raise UserError(f"{samples}: {missing} of {len(full) * n} samples are missing; run the same command again to generate them")

    def array(value: Any) -> np.ndarray:
        return np.array([[float(value(row)) for row in of_problem] for of_problem in full])

    return Tally(
        problems=tuple(problems),
        right=array(lambda row: row["status"] == Status.RIGHT.value),
        no_box=array(lambda row: row["extracted"] is None),
        undecided=array(lambda row: row["status"] == Status.UNDECIDED.value),
        truncated=array(lambda row: row["finish"] in CUT),
        tokens=array(lambda row: row["length"]),
        votes=tuple(tuple(_vote(row) for row in of_problem) for of_problem in full),
    )


def _vote(row: dict[str, Any]) -> Hashable | None:
    if row["status"] == Status.RIGHT.value:
        return RIGHT
    return None if row["extracted"] is None else name_of(row["task"], row["extracted"])


def score(tally: Tally) -> dict[str, Interval]:
    """Every score by its name, with 95 % intervals over problems. Shares are shares of samples.

    Bootstrap intervals, except where a score is 0 or 1 on every problem, as of one sample each: that is a proportion of problems, and has
    Wilson's interval, since resampling problems that all agree would give one of no width.
    """
    n = tally.n
    right_N = [int(c) for c in tally.right.sum(axis=1)]
    values: dict[str, Sequence[float] | np.ndarray] = {f"avg@{n}": tally.accuracy_N}
    for k in draw_sizes(n):
        values[f"pass@{k}"] = [pass_at_k(n, c, k) for c in right_N]
    for k in draw_sizes(n):
        values[f"maj@{k}"] = [maj_at_k(votes, k) for votes in tally.votes]
    k = stability_size(n)
    for tau in TAUS:
        values[f"g-pass@{k}_{tau:g}"] = [g_pass_at_k(n, c, k, tau) for c in right_N]
    if k > 1:
        values[f"mg-pass@{k}"] = [mg_pass_at_k(n, c, k) for c in right_N]
    values["response_length"] = tally.tokens.mean(axis=1)
    for name in ("truncated", "no_box", "undecided"):
        values[name] = getattr(tally, name).mean(axis=1)
    scores = dict(zip(values, bootstrap_means(np.column_stack(list(values.values())))))
    return scores | {name: wilson(sum(v), len(v)) for name, v in values.items() if name != "response_length" and is_proportion(v)}


def to_json(result: SetResult, details: dict[str, Any]) -> dict[str, Any]:
    """The content of results.json: scores, and the counts of every problem."""
    t = result.tally
    per_problem = []
    for i, problem in enumerate(t.problems):
        answers = Counter("(right)" if v is RIGHT else "(none)" if v is None else v for v in t.votes[i])
        per_problem.append({
            "problem": problem, "samples": t.n, "right": int(t.right[i].sum()), "truncated": int(t.truncated[i].sum()),
            "no_box": int(t.no_box[i].sum()), "undecided": int(t.undecided[i].sum()), "mean_tokens": float(t.tokens[i].mean()),
            "most_frequent_answers": answers.most_common(3),
        })  # fmt: skip
    return {
        "model": result.model, "step": result.step, "benchmark": result.benchmark, "problems": len(t.problems), "samples_per_problem": t.n,
        "scores": {name: value._asdict() for name, value in result.scores.items()}, **details, "per_problem": per_problem,
    }  # fmt: skip


def compare(first: SetResult, other: SetResult) -> dict[str, Any]:
    """The difference in avg@n on the same problems: paired bootstrap interval and randomisation test."""
    before, after = first.tally.accuracy_N, other.tally.accuracy_N
    return {
        "benchmark": other.benchmark, "from": first.model, "to": other.model, "problems": len(before),
        "gain": paired_gain(before, after)._asdict(), "p_value": paired_p_value(before, after),
        "problems_better": int((after > before).sum()), "problems_worse": int((after < before).sum()),
    }  # fmt: skip


def benchmark_table(results: Sequence[SetResult]) -> Table:
    """One benchmark, a row for each model; the gain is over the first."""
    first = results[0]
    n, k = first.tally.n, stability_size(first.tally.n)
    table = Table(
        title=f"{escape(first.benchmark)}: {len(first.tally.problems)} problems, {n} sample(s) each, 95 % intervals over problems"
    )
    names = [f"avg@{n}"] + [f"pass@{n}", f"maj@{n}"] * (n > 1) + [f"mg-pass@{k}"] * (k > 1)
    shares = ("truncated", "no_box", "undecided")
    table.add_column("model", overflow="fold")
    for title in [*(f"{name} %" for name in names), "tokens", *(f"{s.replace('_', ' ')} %" for s in shares)]:
        table.add_column(title, justify="right")
    for title in ("gain, points", "p") if len(results) > 1 else ():
        table.add_column(title, justify="right")
    for result in results:
        s = result.scores
        cells = [percent(s[names[0]]), *(f"{100 * s[name].value:.1f}" for name in names[1:])]
        cells += [f"{s['response_length'].value:.0f}", *(f"{100 * s[name].value:.1f}" for name in shares)]
        if result is not first:
            versus = compare(first, result)
            cells += [percent(Interval(**versus["gain"]), sign=True), f"{versus['p_value']:.3f}"]
        table.add_row(escape(result.model), *cells)
    return table
