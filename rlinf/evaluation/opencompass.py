"""Writes predictions in the layout of OpenCompass, <work_dir>/predictions/<model>/<benchmark>.json, which its evaluation stage can read.

There a set that was sampled n times is the set n times over, one pass after another: entry number `pass * problems + problem`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rlinf.evaluation.folder import read_rows
from rlinf.files import write_whole
from rlinf.rewards.math.decide import gold_answer


def export(samples: Path, problems: Sequence[str], work_dir: Path, model: str, benchmark: str) -> Path:
    """Write the predictions of samples.jsonl and return the file."""
    place = {problem: i for i, problem in enumerate(problems)}
    entries = {
        row["sample"] * len(problems) + place[row["problem"]]: {
            "origin_prompt": row["prompt"],
            "prediction": row["response"],
            "gold": gold_answer(row["solutions"][0]),
        }
        for row in read_rows(samples)
    }
    folder = work_dir / "predictions" / model
    os.makedirs(folder, exist_ok=True)
    file = folder / f"{benchmark}.json"
    ordered = {str(i): entries[i] for i in sorted(entries)}
    write_whole(file, [json.dumps(ordered, indent=4, ensure_ascii=False) + "\n"], "replace")
    return file
