"""`rlinf watch`: shows what a run is doing, from its status.json and metrics.jsonl. It only reads files; the run does not notice it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlinf.errors import UserError
from rlinf.launch.status import read_status
from rlinf.metrics.logger import read_metrics
from rlinf.metrics.progress import FIELDS, duration
from rlinf.run_paths import METRICS_FILE, STATUS_FILE

STEPS = 8  # shown
RANKS = 8  # of a component, shown
SILENT = 10.0  # seconds without a new status: the driver is stopped or gone
COLOURS = {"running": "green", "finished": "bold green", "failed": "bold red", "interrupted": "yellow"}


def watch(run_dir: Path, once: bool = False, console: Console | None = None, period: float = 1.0) -> int:
    """Show the run until it ends; once: show it one time. Returns 1 when it failed or its driver is gone. Raises UserError when there is
    no run."""
    console = console or Console()
    status = of_a_run(run_dir)
    if once:
        console.print(picture(run_dir, status, time.time()))
        return exit_code(status, time.time())
    with Live(picture(run_dir, status, time.time()), console=console, auto_refresh=False) as live:
        while status["state"] == "running" and not gone(status, time.time()):
            time.sleep(period)
            status = of_a_run(run_dir)
            live.update(picture(run_dir, status, time.time()), refresh=True)
    return exit_code(status, time.time())


def of_a_run(run_dir: Path) -> dict[str, Any]:
    if status := read_status(run_dir):
        return status
    raise UserError(
        f"{run_dir}: no {STATUS_FILE} here; give the folder of a run that has started: <runner.output_dir>/<runner.experiment_name>"
    )


def gone(status: dict[str, Any], now: float) -> bool:
    return status["state"] == "running" and now - status["time"] > SILENT


def exit_code(status: dict[str, Any], now: float) -> int:
    return int(status["state"] == "failed" or gone(status, now))


def picture(run_dir: Path, status: dict[str, Any], now: float) -> Group:
    """The text to show: heading, last steps, components, engines."""
    metrics = read_metrics(run_dir)[-STEPS:] if (run_dir / METRICS_FILE).exists() else []
    parts: list[Any] = [heading(run_dir, status, now)]
    if metrics:
        parts.append(steps_table(metrics))
    parts.append(components_table(status))
    if status["engines"]:
        parts.append(engines_line(status["engines"]))
    if status["error"]:
        parts.append(Text(status["error"].splitlines()[0], style="red"))
    return Group(*parts)


def heading(run_dir: Path, status: dict[str, Any], now: float) -> Text:
    colour = COLOURS.get(status["state"], "white")
    text = Text.from_markup(
        f"[bold]{escape(run_dir.resolve().name)}[/bold]  [{colour}]{status['state']}[/{colour}]  "
        f"step {status['step']}/{status['total_steps']}"
    )
    if gone(status, now):
        text.append(f"  no sign of the driver (pid {status['pid']} on {status['host']}) for {duration(now - status['time'])}", "bold red")
    elif status["state"] == "running":
        text.append(f"  {status['phase']} for {duration(now - status['phase_since'])}")
        left = seconds_left(status, now)
        text.append(f"  ETA {duration(left)}" if left is not None else "")
    return text


def seconds_left(status: dict[str, Any], now: float) -> float | None:
    """The expected seconds until the run ends, from the mean of the steps that this process has finished."""
    mean = status["seconds_per_step"]
    if mean is None:
        return None
    in_step = min(mean, now - status["step_since"])
    return max(0.0, mean * (status["total_steps"] - status["step"] + 1) - in_step)


def steps_table(metrics: list[dict[str, float]]) -> Table:
    columns = [(label, name, form) for label, name, form in FIELDS if any(name in m for m in metrics)]
    table = Table("step", *(label for label, _, _ in columns), "seconds", "largest phase")
    for m in metrics:
        phases = {
            name: value
            for name, value in m.items()
            if name in ("time/rollout", "time/train", "time/sync_weights", "time/validate", "time/checkpoint")
        }
        cells = [format(m[name], form) if name in m else "" for _, name, form in columns]
        largest = max(phases, key=phases.__getitem__) if phases else ""
        share = f"{largest.removeprefix('time/')} {phases[largest]:.1f}" if largest else ""
        table.add_row(f"{m['step']:.0f}", *cells, f"{m['time/step']:.1f}" if "time/step" in m else "", share)
    return table


def components_table(status: dict[str, Any]) -> Table:
    """What each rank is doing now; of a large component the ranks are counted."""
    table = Table("component", "does")
    for component, ranks in status["components"].items():
        for rank in ranks[:RANKS]:
            work = ", ".join(f"{method} × {n}" if n > 1 else method for method, n in rank["running"].items())
            table.add_row(escape(rank["where"]), work or "[dim]waits[/dim]")
        if len(ranks) > RANKS:
            busy = sum(bool(rank["running"]) for rank in ranks)
            table.add_row(f"{component}: {len(ranks)} ranks", f"{busy} busy, {len(ranks) - busy} wait")
    return table


def engines_line(engines: list[dict[str, float | None]]) -> Text:
    """The samples in flight, and the slowest engine of the last step."""
    text = Text("samples at the engines: " + " ".join(str(e["samples"]) for e in engines))
    known = {k: speed for k, e in enumerate(engines) if (speed := e["tokens_per_second"]) is not None}
    if known:
        slowest = min(known, key=known.__getitem__)
        text.append(f"   slowest in the last step: engine {slowest}, {known[slowest]:,.0f} tokens/s")
        if len(known) > 1:
            text.append(f" (median {sorted(known.values())[len(known) // 2]:,.0f})")
    return text
