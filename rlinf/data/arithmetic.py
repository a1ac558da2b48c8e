"""`rlinf data generate`: a task that a 135M model learns in minutes, sums of two two-digit numbers without a carry. AReaL-boba format.

With carries the model would, in so short a time, only trade one kind of error for another: a bias towards carrying helps half of the
problems and hurts the others. Sums are below LIMIT, because the model mostly gets larger ones right from the start.

Every prompt is the same two worked examples followed by the question. `response`, which RL ignores, is the answer for supervised
fine-tuning. A problem is an unordered pair: 23+45 and 45+23 are the same. No problem is in both files or in the worked examples, and no
answer can be copied from an example.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlinf.data.jsonl import write_splits
from rlinf.errors import UserError

SHOTS = ((23, 45), (58, 67))
SHOT_SUMS = {a + b for a, b in SHOTS}
LIMIT = 130
PROBLEMS = tuple((a, b) for a in range(10, 100) for b in range(a, 100) if a % 10 + b % 10 < 10 and a + b < LIMIT and a + b not in SHOT_SUMS)


def question(a: int, b: int) -> str:
    return f"Q: {a}+{b}=?\nA: {a}+{b}="


def answer(a: int, b: int) -> str:
    return f"{a + b}, \\boxed{{{a + b}}}"


def prompt(a: int, b: int) -> str:
    return "\n".join([question(*shot) + answer(*shot) for shot in SHOTS] + [question(a, b)])


def generate(out_dir: Path, n_train: int, n_val: int, seed: int) -> dict[str, Path]:
    """Write train.jsonl and val.jsonl to out_dir and return their paths. Their content depends on the arguments only.

    Raises UserError when n_train + n_val exceeds the number of distinct problems, and when a file exists with other content.
    """
    if n_train < 1 or n_val < 1 or n_train + n_val > len(PROBLEMS):
        raise UserError(
            f"arithmetic data: {n_train} training and {n_val} validation problems were asked for; "
            f"each must be at least 1 and both together at most {len(PROBLEMS)}"
        )
    words = np.random.Philox(key=[seed, 0]).random_raw(len(PROBLEMS))
    chosen = np.argsort(words, kind="stable")[: n_train + n_val]
    records = []
    for i in chosen.tolist():
        a, b = PROBLEMS[i]
        if words[i] & 1:  # the order of the terms is random too
            a, b = b, a
        record = {"prompt": prompt(a, b), "task": "math", "query_id": f"add-{a}-{b}", "solutions": [f"\\boxed{{{a + b}}}"]}
        records.append(record | {"response": answer(a, b)})
    return write_splits(out_dir, records[:n_train], records[n_train:])
