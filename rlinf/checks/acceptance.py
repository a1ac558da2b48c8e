"""The acceptance test of a machine with one GPU: every part runs in a process of its own, and the results are one JSON file and one page.

    python -m rlinf.checks.acceptance [--out DIR] [--cpu] [--model HF_DIR] [--parts NAME ...]

toolkits/gpu_acceptance.sh calls it. When a part fails, crashes or takes too long, that is reported and the others still run; the exit code
is then 1. --cpu: a rehearsal of all parts with tiny shapes, which says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlinf.errors import UserError

LOG_LINES = 25
LIMITS = {"doctor": 300, "tests": 1800, "parity": 900, "run": 1800, "trainer": 1800, "sync": 900}  # parts in their order; seconds
REHEARSAL_LIMIT = 240
MEANINGS = {
    "doctor": "versions, driver, collectives, disk, limits (`rlinf doctor`)",
    "tests": "the tests marked gpu",
    "parity": "two optimizer steps on the device against plain transformers on CPU, fp32, over packings and families",
    "run": "a collocated GRPO run of a small model, from prompts to new weights",
    "trainer": "tokens a second, MFU and memory of a train step",
    "sync": "weights from the actor into an engine on the same device, against the device's copy bandwidth",
}
PEERS = (  # model, sequence, tokens a second, MFU in percent, GiB: one H100, full recomputation of activations
    ("Qwen3-0.6B", 16384, 11896, 11.1, 12.5),
    ("Qwen3-0.6B", 65536, 10147, 26.8, 19.6),
)
PEERS_SOURCE = "prime-rl, benchmarks/baselines (mode rl, two micro-batches, FlashAttention 3)"


@dataclass(frozen=True)
class Result:
    """The result of a part: `ok`, `failed` or `timed out`; its figures; what to know of it; when it failed, why, and the end of its log."""

    part: str
    status: str
    seconds: float
    figures: dict[str, Any]
    problem: str = ""
    log_tail: str = ""
    remark: str = ""

    @property
    def verdict(self) -> str:
        return ": ".join(filter(None, (self.status, self.problem or self.remark)))


def run_part(part: str, folder: Path, words: list[str], limit: float) -> Result:
    """Run a part in a process of its own; when it takes too long, its whole process group is ended."""
    log, figures_file = folder / f"{part}.log", folder / f"{part}.json"
    figures_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "rlinf.checks.acceptance_parts", part, str(folder), *words]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    seconds = time.monotonic() - started
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    problem, remark = figures.pop("problem", ""), figures.pop("remark", "")
    if code == 0 and not problem:
        return Result(part, "ok", seconds, figures, remark=remark)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    if code is None:
        return Result(part, "timed out", seconds, figures, f"not done after {limit:g} s", tail)
    return Result(part, "failed", seconds, figures, problem or f"exit code {code}", tail)


def page(results: list[Result], machine: dict[str, Any]) -> str:
    """The results as Markdown, for people."""
    lines = [
        f"# Acceptance: {machine['device']}",
        "",
        *([] if not machine["rehearsal"] else ["A rehearsal on CPU with tiny shapes: it says nothing about a GPU.", ""]),
    ]
    lines += [
        f"{machine['platform']}, Python {machine['python']}, {machine['time']}",
        "",
        "| part | result | seconds | what it is |",
        "|---|---|---:|---|",
    ]
    lines += [f"| {r.part} | {r.verdict} | {r.seconds:.0f} | {MEANINGS[r.part]} |" for r in results]
    by_part = {r.part: r.figures for r in results}
    if rows := by_part.get("trainer", {}).get("rows"):
        lines += [
            "",
            "## Trainer",
            "",
            "| shape | tokens of a sequence | tokens/s | MFU | step s | peak GiB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        lines += [trainer_row(row) for row in rows]
        lines += [f"| *{model}, {PEERS_SOURCE}* | {n:,} | {rate:,} | {mfu} % | | {gib} |" for model, n, rate, mfu, gib in PEERS]
    if sync := by_part.get("sync"):
        lines += ["", "## Weight sync", "", "| | GB/s |", "|---|---:|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in sync.items() if isinstance(value, float)]
    if run := by_part.get("run"):
        lines += [
            "",
            "## Run",
            "",
            *(f"* {name}: {value:.4g}" if isinstance(value, float) else f"* {name}: {value}" for name, value in run.items()),
        ]
    for r in results:
        if r.status != "ok":
            lines += ["", f"## {r.part}: the end of its log", "", "```", r.log_tail, "```"]
    return "\n".join(lines) + "\n"


def trainer_row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['shape']} | {row['tokens']:,} | {row['error']} | | | |"
    mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
    return (
        f"| {row['shape']} | {row['tokens']:,} | {row['tokens_per_second']:,.0f} | {mfu} | {row['seconds']:.2f} | {row['peak_gib']:.1f} |"
    )


def describe(rehearsal: bool) -> dict[str, Any]:
    from rlinf import device

    if not rehearsal and not device.usable():
        raise UserError("torch finds no GPU here (rlinf doctor says why); --cpu rehearses the acceptance without one")
    name = "CPU" if rehearsal else f"{device.gpu_name()}, {device.gpu_memory() / 2**30:.1f} GiB"
    return {"device": name, "rehearsal": rehearsal, "platform": platform.platform(), "python": platform.python_version(),
            "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_acceptance.sh", description="Examine a machine with one GPU.")
    parser.add_argument("--out", type=Path, default=Path("acceptance"), help="folder of the results (./acceptance)")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal without a GPU, with tiny shapes")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of a small model for the run (default: a random one)")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART", help=", ".join(LIMITS))
    args = parser.parse_args(arguments)
    try:
        machine = describe(args.cpu)
    except UserError as error:
        sys.stderr.write(f"gpu_acceptance: {error}\n")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    words = ["--cpu"] * args.cpu + (["--model", str(args.model.resolve())] if args.model else [])
    results = []
    for part in LIMITS:
        if part in args.parts:
            results.append(run_part(part, args.out.resolve(), words, REHEARSAL_LIMIT if args.cpu else LIMITS[part]))
            sys.stdout.write(f"{part:<8} {results[-1].seconds:4.0f} s  {results[-1].verdict}\n")
            sys.stdout.flush()
    (args.out / "acceptance.json").write_text(json.dumps({"machine": machine, "parts": [asdict(r) for r in results]}, indent=1) + "\n")
    (args.out / "acceptance.md").write_text(page(results, machine))
    sys.stdout.write(f"written: {args.out / 'acceptance.json'}, {args.out / 'acceptance.md'}\n")
    return 0 if all(r.status == "ok" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
