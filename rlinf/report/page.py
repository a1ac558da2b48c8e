"""report.html: one self-contained page about a run. Everything that it shows is in the file; nothing is fetched.

Curves, findings and configuration are plain JSON. The samples of each step, and the text of each sample that is shown in full, are
compressed parts that the page opens when they are asked for. What a model wrote may be hostile: it is in the page only as base64, is shown
only as text nodes, and the policy of the page lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlinf.config.keys import known_keys
from rlinf.config.values import yaml_line
from rlinf.data.jsonl import atomic_write
from rlinf.errors import UserError
from rlinf.metrics.names import metric_of
from rlinf.report.parts import MAX_TEXT_STEPS, Parts, choose_files
from rlinf.report.rules import RULES, Finding, find_problems
from rlinf.report.run_data import RunData, count_all, open_run
from rlinf.run_paths import REPLACED, RunPaths

MAX_BYTES = 20_000_000
MAX_POINTS = 2000  # of a curve
TILES = (
    "rollout/rewards", "rollout/accuracy", "rollout/response_length", "eval/accuracy", "perf/tokens_per_second", "time/step",
)  # fmt: skip
INSIDE_TRAIN = {
    "pack",
    "recompute_logprobs",
    "forward_backward",
    "optimizer",
    "values",
    "critic_update",
    "token_rewards",
}  # parts of the phase `train`, each its slowest rank's


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page of a run to `output` (default RUN_DIR/report.html), atomically. Raises UserError when there is no run."""
    target = output or run_dir / "report.html"
    run = open_run(run_dir)
    refuse_foreign(target)
    parts = Parts()
    for file, rows in count_all(run):
        parts.add_headers(file, rows)
    findings = find_problems(run)
    chosen = choose_files(run.files, {step for f in findings for step in f.steps})
    for file in chosen:
        parts.add_texts(file, file.rows())
    style, script = asset("page.css"), asset("page.js")
    room = MAX_BYTES - len(style) - len(script) - 3 * len(to_json(page_data(run, findings, parts)).encode())
    parts.fit(room, chosen)
    page = fill(
        asset("page.html"),
        {
            "CSP": policy(script),
            "TITLE": html.escape(f"{run.path.resolve().name} · rlinf"),
            "STYLE": style,
            "DATA": to_json(page_data(run, findings, parts)),
            "BLOBS": parts.html(),
            "SCRIPT": script,
        },
    )
    with atomic_write(target) as out:
        out.write(page)
    return target


def refuse_foreign(target: Path) -> None:
    """Raise UserError when the page would overwrite something that is not a report, or its folder does not exist."""
    if target.is_dir():
        raise UserError(f"{target}: is a folder; name a file in it with --output")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}/: no such folder; make it, or name another file with --output")
    if target.is_file() and (start := target.open("rb").read(4096)) and b" \xc2\xb7 rlinf</title>" not in start:
        raise UserError(f"{target}: there already, and no report of rlinf; nothing was written: name another file with --output")


def asset(name: str) -> str:
    return (files("rlinf.report") / "assets" / name).read_text(encoding="utf-8")


def fill(template: str, values: dict[str, str]) -> str:
    """Replace @NAME@ marks in one pass, so that a value that looks like a mark stays as it is."""
    return re.sub("@(" + "|".join(values) + ")@", lambda mark: values[mark[1]], template)


def policy(script: str) -> str:
    """A content security policy: nothing is loaded from anywhere, and only this script may run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def to_json(value: Any) -> str:
    """JSON that cannot end the script element in which it is."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def page_data(run: RunData, findings: Sequence[Finding], parts: Parts) -> dict[str, Any]:
    lines = thinned(run.metrics, {step for f in findings for step in f.steps})
    names = sorted({name for m in run.metrics for name in m} - {"step", "time"})
    metrics = {name: [rounded(m.get(name)) for m in lines] for name in names}
    helps = {name: key.help for name, key in known_keys().items()}
    status = run.status
    return {
        "title": run.path.resolve().name,
        "path": str(run.path.resolve()),
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "state": status.get("state", "no status file") + (f": {status['error'].splitlines()[0]}" if status.get("error") else ""),
        "step": int(run.metrics[-1]["step"]) if run.metrics else 0,
        "total": status.get("total_steps"),
        "steps": [int(m["step"]) for m in lines],
        "metrics": metrics,
        "phases": phases(metrics),
        "summary": summary(run.metrics),
        "meanings": {name: [m.meaning, m.healthy, m.action] for name in names if (m := metric_of(name))},
        "findings": [vars(f) for f in findings],
        "rules": [rule.__name__.replace("_", " ") for rule in RULES],
        "settings": [[key, yaml_line(value), run.origins.get(key, ""), helps.get(key, "")] for key, value in run.config.items()],
        "environment": [{name: value for name, value in start.items() if name != "settings"} for start in run.starts],
        "files": [parts.describe(file) for file in run.files],
        "leftOut": left_out(run, parts, len(lines)),
    }


def summary(metrics: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The numbers of the tiles, computed from all steps, also those that the curves leave out: for each metric the mean of the first three
    and of the last five steps; the first and last validation; the median speed; and the number of steps with their seconds."""
    columns = {name: [v for m in metrics if math.isfinite(v := m.get(name, math.nan))] for name in TILES}
    held, speed, seconds = (columns[name] for name in ("eval/accuracy", "perf/tokens_per_second", "time/step"))
    return {
        "ends": {name: [statistics.fmean(values[:3]), statistics.fmean(values[-5:])] for name, values in columns.items() if values},
        "held": [held[0], held[-1]] if len(held) > 1 else None,
        "speed": statistics.median_high(speed) if speed else None,
        "seconds": [sum(seconds), len(seconds)],
    }


def phases(metrics: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """The phases of the loop, largest first, and the rest of the step's time.

    Where phases overlap, each counts only while it runs alone, and the overlap is a part of its own, so that the parts add up to the step.
    """
    step = metrics.get("time/step")
    if step is None:
        return []
    found = {name.removeprefix("time/"): values for name, values in metrics.items() if name.startswith("time/") and name != "time/step"}
    top = {
        name: found.get(f"alone_{name}", values)
        for name, values in found.items()
        if name not in INSIDE_TRAIN and not name.startswith("alone_")
    }
    sums = [sum(column[i] or 0.0 for column in top.values()) for i in range(len(step))]
    top["other"] = [rounded(max(0.0, (whole or 0.0) - used)) for whole, used in zip(step, sums)]
    order = sorted(top, key=lambda name: -sum(v or 0.0 for v in top[name]))
    return [{"name": name.replace("_", " "), "metric": f"time/{name}", "values": top[name]} for name in order]


def thinned(metrics: Sequence[dict[str, float]], flagged: set[int]) -> list[dict[str, float]]:
    """At most MAX_POINTS lines, evenly spaced, among them the first, the last and the flagged ones."""
    if len(metrics) <= MAX_POINTS:
        return list(metrics)
    kept = {round(i * (len(metrics) - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)}
    return [m for i, m in enumerate(metrics) if i in kept or m["step"] in flagged]


def rounded(value: float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def left_out(run: RunData, parts: Parts, points: int) -> list[str]:
    """What is not in the page, and where to find it."""
    samples, shown = sum(parts.samples.values()), len(parts.texts)
    lines = [
        f"The text of {shown:,} of {samples:,} samples is here, from {len({f for f, _ in parts.texts})} of {len(run.files)} sample files: "
        f"the first, the last, those that a finding names and evenly spaced ones, at most {MAX_TEXT_STEPS}; of each the highest and lowest "
        "advantage, the largest log-probability gap and some at random. The text of every sample is in samples/step_NNNNNN.jsonl; each "
        "sample above names its line."
    ]
    if parts.dropped_texts:
        lines.append(f"{parts.dropped_texts:,} more texts were chosen but did not fit into {MAX_BYTES / 1e6:.0f} MB.")
    missing = [f for f in run.files if f.label not in parts.headers]
    if missing:
        lines.append(f"The samples of {len(missing):,} files did not fit, from {missing[0].path.name} to {missing[-1].path.name}.")
    if points < len(run.metrics):
        lines.append(f"The curves show {points:,} of {len(run.metrics):,} steps; every step is in metrics.jsonl.")
    folders = (run.path, RunPaths(run.path).samples_dir)
    replaced = [name for folder in folders for name in sorted(p.name for p in folder.glob(f"*{REPLACED}*"))]
    if replaced:
        lines.append(
            f"The run went back to a checkpoint; what it then repeated is in {', '.join(replaced[:6])}{' …' if len(replaced) > 6 else ''}."
        )
    lines.append("A token's values are kept in a byte each: within 8 %, and 0 below one millionth.")
    return lines
