"""What the untrained SmolLM2-135M-Instruct can do when it is asked several times: `rlinf eval` on 64 validation problems of
`rlinf data generate`, four samples each at temperature 1, once for every seed of the sampling noise.

    python benchmarks/sampling.py [--seeds 1234 7 42]

Prints a line a seed and writes benchmarks/results/sampling.json. Model and data must be there (examples/math/quickstart.sh makes them).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).with_name("results") / "sampling.json"
PROBLEMS = 64
PROTOCOL = [
    "evaluation.custom.n=4",
    "evaluation.custom.temperature=1.0",
    "evaluation.custom.max_tokens=24",
    'evaluation.custom.stop=["\\n"]',
]
LOCAL = ["cluster.device=cpu", "rollout.rollout_backend=embedded"]


def scores(cache: Path, seed: int) -> dict[str, Any]:
    """Of one evaluation, as its results.json has them."""
    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder, "arithmetic64.jsonl")
        lines = (cache / "data" / "arithmetic" / "val.jsonl").read_text().splitlines(keepends=True)
        problems.write_text("".join(lines[:PROBLEMS]))
        words = [str(cache / "models" / "SmolLM2-135M-Instruct"), f"evaluation.custom.path={problems}", *PROTOCOL, *LOCAL]
        command = [sys.executable, "-m", "rlinf", "eval", *words, f"rollout.seed={seed}", f"evaluation.output_dir={folder}/out"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"seed {seed} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
        (results,) = Path(folder, "out").rglob("results.json")
        return json.loads(results.read_text())["scores"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 7, 42])
    cache = Path(os.environ.get("RLINF_CACHE") or "~/.cache/rlinf").expanduser()
    found = {}
    for seed in parser.parse_args().seeds:
        found[f"seed-{seed}"] = scores(cache, seed)
        sys.stdout.write(f"seed {seed}: {json.dumps(found[f'seed-{seed}'])}\n")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    RESULT.write_text(json.dumps({"machine": machine, "problems": PROBLEMS, "protocol": PROTOCOL, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
