"""The families of the reasoning-gym package (https://github.com/open-thought/reasoning-gym) as tasks `rg/<family>`.

A record's one solution is the JSON of the entry that the family's scorer wants: {"answer": ..., "metadata": ...}. The package is needed
only where such tasks are used; its scorers run in the cage, since some of them execute or search.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlinf.data.jsonl import write_splits
from rlinf.errors import UserError
from rlinf.rewards.math.decide import Decision

NOT_REPRODUCIBLE = frozenset(("knight_swap", "list_functions"))  # two datasets of one seed differ (0.1.25)
REFUSED = {
    "game_of_life_halting": "its scorer gives full marks to any text",
    "composite": "it is a mixture; generate its families one by one",
}
# what code that meets a strange text may raise
SCORER_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError, ArithmeticError, AssertionError)
INSTRUCTION = "Put your final answer within \\boxed{}."


def check_family(family: str) -> None:
    """Raises UserError for a family that is unknown, refused, or cannot be scored because the package is missing."""
    if family in REFUSED:
        raise UserError(f"task 'rg/{family}': refused, because {REFUSED[family]}")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"task 'rg/{family}': the package reasoning-gym is not installed; pip install '.[rg]'")
    if family not in families():
        raise UserError(f"task 'rg/{family}': reasoning-gym has no such family; it has {', '.join(sorted(families() - set(REFUSED)))}")


def families() -> frozenset[str]:
    """All families of the installed package, the refused ones too. Takes about two seconds the first time."""
    return frozenset(load().factory.DATASETS)


def load() -> Any:
    import reasoning_gym

    return reasoning_gym


def judge(family: str, answer: str, solutions: tuple[str, ...]) -> Decision:
    """Judge an answer; only in the cage. Partial credit counts as wrong; when the scorer fails on the text, the result is undecided."""
    score_answer = load().get_score_answer_fn(family)
    best = 0.0
    for solution in solutions:
        entry = json.loads(solution)
        try:
            score = float(score_answer(answer.strip(), entry))
        except SCORER_ERRORS as error:
            return Decision("undecided", "rg_scorer_failed", f"{type(error).__name__}: {error}"[:200])
        best = max(best, score)
    return Decision("right" if best == 1.0 else "wrong", "rg", f"score {best:g}")


def generate(family: str, size: int, seed: int, held_out: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training records, held_out records) in the AReaL-boba format, `size` and `held_out` of them; no question occurs twice in the two
    together.

    Raises UserError for a family whose problems do not depend on the seed alone, whose scorer does not accept its own answers, or that has
    too few different questions.
    """
    check_family(family)
    if family in NOT_REPRODUCIBLE:
        raise UserError(f"rg/{family}: two data sets of one seed differ; choose another family")
    wanted = size + held_out
    dataset = load().create_dataset(family, size=2 * wanted + 16, seed=seed)  # some families repeat themselves
    score_answer = load().get_score_answer_fn(family)
    records: dict[str, dict[str, Any]] = {}
    for i in range(len(dataset)):
        entry = dataset[i]
        solution = json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]}, default=str)
        if entry["answer"] is None or score_answer(entry["answer"], json.loads(solution)) != 1.0:
            raise UserError(f"rg/{family}: its own answer does not get full marks (entry {i}); it cannot be used for training")
        prompt = f"{entry['question'].rstrip()}\n{INSTRUCTION}\n"
        records.setdefault(
            prompt, {"prompt": prompt, "task": f"rg/{family}", "query_id": f"rg-{family}-{seed}-{i}", "solutions": [solution]}
        )
        if len(records) == wanted:
            break
    if len(records) < wanted:
        raise UserError(f"rg/{family}: only {len(records)} different questions with seed {seed}; ask for fewer than {wanted} in all")
    rows = list(records.values())
    return rows[:size], rows[size:]


def generate_files(out_dir: Path, names: Sequence[str], n_train: int, n_val: int, seed: int) -> dict[str, Path]:
    """Write train.jsonl and val.jsonl with n_train and n_val problems of each task `rg/<family>`; returns their paths."""
    if n_train < 1 or n_val < 1:
        raise UserError(f"reasoning-gym data: {n_train} training and {n_val} validation problems were asked for; each must be at least 1")
    for name in names:
        if not name.startswith("rg/"):
            raise UserError(f"--task {name!r}: can be `arithmetic`, or `rg/<family>` (several with commas)")
        if names.count(name) > 1:
            raise UserError(f"--task {name!r}: is named twice, and would give the same problems twice")
    parts = [generate(name.removeprefix("rg/"), n_train, seed, n_val) for name in names]
    train, val = ([record for part in parts for record in part[i]] for i in (0, 1))
    return write_splits(out_dir, train, val)
