"""What running ahead of the actor is worth where a few answers are very long: simulated engines, the real schedules, a clock that jumps.

    python -m benchmarks.asynchrony [--steps N] [--seeds N] [--out FILE]

Prints seconds a step for the synchronous loop and for each schedule, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import numpy as np

from tests.simulated_runs import GROUPS, SAMPLES, UPDATE, play

ARMS: dict[str, tuple[str, int, dict[str, bool]]] = {
    "synchronous": ("logical", 0, {}),
    "logical, eta 1": ("logical", 1, {}),
    "wallclock, eta 1": ("wallclock", 1, {}),
    "wallclock, eta 1, partial": ("wallclock", 1, {"partial": True}),
    "wallclock, eta 4": ("wallclock", 4, {}),
}


def measure(steps: int, seed: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, (schedule, eta, more) in ARMS.items():
        outcome = play(schedule, eta, steps, seed, **more)
        lengths, bias = np.array(outcome.lengths), [m.get("rollout/length_bias", 0.0) for m in outcome.metrics]
        found[name] = {
            "seconds_per_step": outcome.seconds / steps,
            "staleness_max": max(outcome.stale),
            "length_bias_of_first_step": bias[0],
            "length_bias_mean": sum(bias) / steps,
            "longest_over_median": float(lengths.max() / np.median(lengths)),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "asynchrony.json")
    args = parser.parse_args()
    runs = [measure(args.steps, seed) for seed in range(args.seeds)]
    base = "synchronous"
    table = {
        name: {key: median(run[name][key] for run in runs) for key in runs[0][name]}
        | {"speedup": median(run[base]["seconds_per_step"] / run[name]["seconds_per_step"] for run in runs)}
        for name in ARMS
    }
    shape = {
        "groups": GROUPS,
        "samples": SAMPLES,
        "update_seconds": UPDATE,
        "seconds_per_token": 1,
        "steps": args.steps,
        "seeds": args.seeds,
    }
    args.out.write_text(json.dumps({"simulated": shape, "medians": table}, indent=1) + "\n")
    for name, row in table.items():
        sys.stdout.write(
            f"{name:28} {row['seconds_per_step']:8.0f} s a step  {row['speedup']:5.2f}x  staleness {row['staleness_max']:.0f}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
