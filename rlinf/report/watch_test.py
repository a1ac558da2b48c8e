"""What `rlinf watch` shows of a run's status."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from rlinf.cli import main
from rlinf.report.watch import SILENT, seconds_left, watch
from tests.run_folders import HEALTHY, make_run


def status(run: Path, **changes: object) -> None:
    now = time.time()
    rank = {"where": "actor rank 0 (node 0, pid 12)", "running": {"train_step": 1}}
    idle = {"where": "actor rank 1 (node 0, pid 13)", "running": {}}
    content = {
        "run_id": "r", "state": "running", "error": "", "time": now, "started": now - 100, "host": "here", "pid": 11, "step": 4,
        "total_steps": 10, "step_since": now - 5, "seconds_per_step": 20.0, "phase": "step 4, train", "phase_since": now - 3,
        "components": {
            "actor": [rank, idle],
            "rollout": [{"where": f"rollout rank {k}", "running": {"generate": k} if k else {}} for k in range(12)],
        },
        "engines": [{"samples": 3, "tokens_per_second": 900.0}, {"samples": 7, "tokens_per_second": 120.0}],
    }  # fmt: skip
    fresh = run / "status.new"
    fresh.write_text(json.dumps(content | changes))
    fresh.replace(run / "status.json")


def shown(run: Path) -> tuple[int, str]:
    screen = io.StringIO()
    return watch(run, once=True, console=Console(file=screen, width=160)), screen.getvalue()


def test_phase_eta_components_and_slowest_engine(tmp_path: Path) -> None:
    run = make_run(tmp_path, HEALTHY, steps=3)
    status(run)
    code, text = shown(run)
    assert code == 0 and "step 4/10" in text and "step 4, train for 0:03" in text and "ETA 2:15" in text
    assert "train_step" in text and "waits" in text and "rollout: 12 ranks" in text and "11 busy, 1 wait" in text
    assert "samples at the engines: 3 7" in text and "engine 1, 120 tokens/s" in text
    assert "reward" in text and "train 5." in text


def test_a_driver_that_is_silent_is_not_called_running(tmp_path: Path) -> None:
    run = make_run(tmp_path, HEALTHY, steps=1)
    status(run, time=time.time() - SILENT - 20)
    code, text = shown(run)
    assert code == 1 and "no sign of the driver (pid 11 on here) for 0:30" in text and "ETA" not in text


def test_it_ends_with_the_run_and_tells_how(tmp_path: Path) -> None:
    run = make_run(tmp_path, HEALTHY, steps=1)
    status(run)
    later = threading.Timer(0.3, lambda: status(run, state="failed", error="actor rank 0 died\nlong story"))
    later.start()
    screen = io.StringIO()
    assert watch(run, console=Console(file=screen, width=160), period=0.05) == 1
    assert "failed" in screen.getvalue() and "actor rank 0 died" in screen.getvalue() and "long story" not in screen.getvalue()
    later.join()


def test_no_estimate_before_the_first_step_is_done() -> None:
    now = 1000.0
    assert seconds_left({"seconds_per_step": None}, now) is None
    assert seconds_left({"seconds_per_step": 10.0, "total_steps": 5, "step": 5, "step_since": 900.0}, now) == 0  # overdue


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2 and "no status.json here" in capsys.readouterr().err


DAMAGED = "not a JSON object"


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (b"", DAMAGED),
        (b'{"state": "runn', DAMAGED),
        (b"[]", DAMAGED),
        (b"\xff\0", DAMAGED),
        (b"{}", "no field `state`"),
        ({"error": 3}, "`error` is 3, not a string"),
        ({"time": "now"}, '`time` is "now", not a number'),
        ({"seconds_per_step": "2"}, '`seconds_per_step` is "2", not a number or null'),
        ({"components": {"actor": [3]}}, '`components` is {"actor": [3]}, not an object with the ranks of each component'),
        ({"engines": [{}]}, "`engines` is [{}], not a list of engines"),
    ],
)
def test_a_damaged_status_is_named(tmp_path: Path, damaged: bytes | dict, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, HEALTHY, steps=1)
    if isinstance(damaged, dict):
        status(run, **damaged)
    else:
        (run / "status.json").write_bytes(damaged)
    for command in ("watch", "report"):
        assert main([command, str(run)]) == 2
        assert f"{run / 'status.json'} is damaged ({said}); remove it" in capsys.readouterr().err
