"""How large is the report of a long run, and how soon does a browser show it?

    python -m benchmarks.report_page [--steps 500] [--out benchmarks/results/report_page.json]

The run folder, 500 steps x 128 samples, is made by tests/run_folders.py. Prints and writes the size, the seconds to make the page, and
the seconds from opening the file in headless Chromium to the page's saying that it is ready: five times, and their median. Limits: 20 MB,
3 s. The exit code says whether they hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rlinf.report.page import MAX_BYTES, write_report
from tests.chromium import chromium
from tests.run_folders import HEALTHY, make_run

LIMIT_SECONDS, TIMES = 3.0, 5
RESULT = Path(__file__).with_name("results") / "report_page.json"


def measure(folder: Path, steps: int) -> dict[str, object]:
    run = make_run(folder, HEALTHY, steps=steps, prompts=16, group_size=8, words=400)
    started = time.monotonic()
    page = write_report(run)
    making = time.monotonic() - started
    with chromium() as browser:
        ready = [browser.open(page) for _ in range(TIMES)]
        assert browser.problems == [], browser.problems
    median = statistics.median(ready)
    return {
        "steps": steps, "samples_a_step": 128, "bytes": page.stat().st_size, "seconds_to_make": round(making, 2),
        "seconds_until_ready": [round(s, 3) for s in ready], "median_seconds_until_ready": round(median, 3),
        "limits_hold": page.stat().st_size < MAX_BYTES and median < LIMIT_SECONDS,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.steps)
    machine = {"cores": os.cpu_count(), "load_average": [round(x, 1) for x in os.getloadavg()], "python": platform.python_version()}
    args.out.write_text(json.dumps(found | {"machine": machine}, indent=1) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if found["limits_hold"] else 1


if __name__ == "__main__":
    sys.exit(main())
