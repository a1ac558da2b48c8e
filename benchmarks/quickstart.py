"""Does the quickstart learn, in time? Runs it for each seed and once with learning rate 0, and judges what the runs left behind.

    python benchmarks/quickstart.py [--seeds 1234 7] [--steps N] [--no-control]

Prints a line a run and writes benchmarks/results/quickstart.json. Model and data must be there (examples/math/quickstart.sh makes them).
Reward gain: mean of the last five steps minus mean of the first three. Accuracy gain: greedy, the same 200 held-out problems, paired
bootstrap over problems.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rlinf.metrics.logger import read_metrics
from rlinf.metrics.summary import paired_gain
from rlinf.run_folder.checkpoints import read_checkpoint
from rlinf.run_paths import RunPaths

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).with_name("results") / "quickstart.json"


def run(out: Path, name: str, *words: str) -> dict[str, float]:
    """One run in `out`; what it gained and what it cost."""
    command = [
        sys.executable,
        "-m",
        "rlinf",
        "train",
        "smollm2-135m-grpo-cpu",
        f"runner.output_dir={out}",
        f"runner.experiment_name={name}",
        *words,
    ]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{name} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    cost = re.search(r"CPU seconds on this machine: (\d+) \((.*)\); peak memory \(PSS\) ([\d.]+) GiB", done.stderr)
    assert cost is not None, done.stderr[-2000:]
    return judge(out / name) | {
        "wall_seconds": seconds,
        "cpu_seconds": float(cost[1]),
        "cpu_by_phase": cost[2],
        "peak_pss_gib": float(cost[3]),
    }


def judge(run_dir: Path) -> dict[str, float]:
    metrics = [m for m in read_metrics(run_dir) if m["step"] > 0]
    rewards = [m["rollout/rewards"] for m in metrics]
    scores = read_checkpoint(RunPaths(run_dir).latest.resolve()).state["validation"]
    first, last = (scores[str(f(map(int, scores)))] for f in (min, max))
    gain = paired_gain(np.array(first["right"], float), np.array(last["right"], float))
    return {
        "steps": len(metrics),
        "reward_first_3": statistics.mean(rewards[:3]),
        "reward_last_5": statistics.mean(rewards[-5:]),
        "reward_gain": statistics.mean(rewards[-5:]) - statistics.mean(rewards[:3]),
        "greedy_before": float(np.mean(first["right"])),
        "greedy_after": float(np.mean(last["right"])),
        "greedy_gain": gain.value,
        "greedy_gain_low": gain.low,
        "greedy_gain_high": gain.high,
        "boxed_before": float(np.mean(first["boxed"])),
        "boxed_after": float(np.mean(last["boxed"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 7])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--no-control", action="store_true")
    args = parser.parse_args()
    extra = [f"runner.max_steps={args.steps}"] if args.steps else []
    runs = {f"seed-{seed}": [f"data.seed={seed}", f"rollout.seed={seed}"] for seed in args.seeds}
    if not args.no_control:
        runs["control-lr-0"] = ["actor.optim.lr=0.0"]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in runs.items():
            results[name] = run(Path(folder), name, *words, *extra)
            sys.stdout.write(f"{name}: {json.dumps(results[name])}\n")
            sys.stdout.flush()
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
