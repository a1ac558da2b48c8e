"""The files that a run leaves, its progress line, and the statistics of the closing table."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlinf.errors import UserError
from rlinf.metrics.logger import MetricLogger, read_metrics
from rlinf.metrics.names import METRICS, markdown, undocumented
from rlinf.metrics.progress import Progress, duration
from rlinf.metrics.summary import Scores, paired_gain, show_summary, wilson
from rlinf.metrics.timers import Timers

ROOT = Path(__file__).resolve().parents[2]


def tensorboard_scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_jsonl_and_tensorboard_hold_the_same_numbers_on_the_same_axis(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, ["tensorboard"])
    for step in (0, 1, 5):
        logger.log(step, {"rollout/rewards": step / 4, "train/loss": math.nan if step == 1 else 0.5})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == {0: 1, 1: 2, 5: 3}[step]  # written through, not at the end
    assert tensorboard_scalars(tmp_path)["rollout/rewards"] == [(0, 0.0), (1, 0.25), (5, 1.25)]  # before close()
    logger.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rollout/rewards"], line["train/loss"]) for line in lines] == [
        (0, 0.0, 0.5),
        (1, 0.25, None),
        (5, 1.25, 0.5),
    ]
    assert math.isnan(read_metrics(tmp_path)[1]["train/loss"]) and math.isnan(tensorboard_scalars(tmp_path)["train/loss"][1][1])


def test_resume_goes_on_after_the_checkpoint_and_keeps_what_it_replaces(tmp_path: Path) -> None:
    first = MetricLogger(tmp_path, ["tensorboard"])
    for step in range(1, 6):
        first.log(step, {"x/y": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x/')  # the machine died here
    time.sleep(1.1)  # TensorBoard orders event files by the second in their name
    second = MetricLogger(tmp_path, ["tensorboard"], resume_step=3)
    for step in (4, 5, 6):
        second.log(step, {"x/y": 100.0 + step})
    second.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0)]
    assert [(line["step"], line["x/y"]) for line in read_metrics(tmp_path)] == expected
    assert tensorboard_scalars(tmp_path)["x/y"] == expected
    replaced = (tmp_path / "metrics.jsonl.replaced-1").read_text().splitlines()
    assert [json.loads(line)["step"] for line in replaced[:2]] == [4, 5] and replaced[2] == '{"step": 6, "x/'
    MetricLogger(tmp_path, [], resume_step=5).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl.replaced-2").read_text().splitlines()] == [6]


def test_resume_at_the_last_step_moves_nothing(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, [])
    logger.log(1, {"x/y": 1.0})
    logger.close()
    second = MetricLogger(tmp_path, [], resume_step=1)
    assert second.last_step == 1
    second.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_line_that_a_dead_run_did_not_write_can_be_made_up_for(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, [])
    logger.log(1, {"x/y": 1.0})
    logger.close()
    second = MetricLogger(tmp_path, [], resume_step=2)
    assert second.last_step == 1
    second.log(2, {"x/y": 2.0})
    second.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_run_that_goes_on_from_its_start_logs_step_0_again(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, [])
    logger.log(0, {"x/y": 1.0})
    logger.close()
    second = MetricLogger(tmp_path, [], resume_step=-1)
    second.log(0, {"x/y": 2.0})
    second.close()
    assert [line["x/y"] for line in read_metrics(tmp_path)] == [2.0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\0" * 8 + b'{"step": 2}', "not JSON"),
        (b"3", "not a JSON object"),
        (b'{"step": "\xff"}', "not UTF-8"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"x/y": 1.0}', "no field `step`"),
        (b'{"step": "two"}', '`step` is "two", not a whole number from 0'),
        (b'{"step": null}', "`step` is null, not a whole number"),
        (b'{"step": 1.5}', "`step` is 1.5, not a whole number"),
        (b'{"step": 1}', "step 1 comes after step 1"),
        (b'{"step": 2, "x/y": "1.0"}', '`x/y` is "1.0", not a number or null'),
        (b'{"step": 2, "x/y": true}', "`x/y` is true, not a number"),
        (b'{"step": 2, "x/y": {"z": 1}}', "`x/y` is {.*}, not a number"),
        (b'{"step": 2, "x/y": ' + b"9" * 400 + b"}", "`x/y` is 9+…, not a number"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    for read in (read_metrics, lambda folder: MetricLogger(folder, [], resume_step=1)):
        with pytest.raises(UserError, match=f"{file}, line 2: {said}.*take that line out"):
            read(tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_numbers_that_are_not_finite_are_read_as_they_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a/b": NaN, "c/d": -Infinity, "e/f": null, "g/h": 3}\n{"step": 2, "to')
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a/b"]) and line["c/d"] == -math.inf and math.isnan(line["e/f"])
    assert type(line["step"]) is int and isinstance(line["g/h"], float)


def test_a_step_is_logged_once_and_a_file_is_never_overwritten(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, [])
    logger.log(2, {})
    with pytest.raises(ValueError, match="step 2 come after those of step 2"):
        logger.log(2, {})
    logger.close()
    with pytest.raises(FileExistsError):
        MetricLogger(tmp_path, [])
    with pytest.raises(ValueError, match="nowhere"):
        MetricLogger(tmp_path / "other", ["nowhere"])


def test_the_metrics_room_imports_neither_torch_nor_tensorflow() -> None:
    modules = "rlinf.metrics.logger, rlinf.metrics.progress, rlinf.metrics.summary"
    code = f"import sys, {modules}; print([m for m in ('torch', 'tensorflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip() == "[]"


def test_timers_add_up_and_start_anew() -> None:
    timers = Timers()
    for _ in range(2):
        with timers.phase("rollout"):
            time.sleep(0.01)
    with pytest.raises(KeyError), timers.phase("broken"):
        raise KeyError
    metrics = timers.collect(tokens=100)
    assert metrics["time/step"] >= metrics["time/rollout"] >= 0.02 and "time/broken" in metrics
    assert metrics["perf/tokens_per_second"] == pytest.approx(100 / metrics["time/step"])
    assert list(timers.collect()) == ["time/step"] and undocumented(metrics) == []


def test_phases_that_overlap_are_told_apart_and_add_up_to_the_step() -> None:
    now = [0.0]
    timers = Timers(lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    rollout, again = timers.phase("rollout"), timers.phase("rollout")
    after(1)  # 1 s of nothing
    with rollout:
        after(2)  # rollout alone
        with again:
            after(3)  # twice at once: 3 s, not 6
        with timers.phase("train"):
            after(4)  # both
            metrics = timers.collect()
            after(5)  # both, but of the next step
        later = timers.collect()
    assert metrics == {
        "time/rollout": 9,
        "time/train": 4,
        "time/step": 10,
        "time/alone_rollout": 5,
        "time/alone_train": 0,
        "time/overlap": 4,
    }
    assert later == {"time/rollout": 5, "time/train": 5, "time/step": 5, "time/alone_rollout": 0, "time/alone_train": 0, "time/overlap": 5}
    after(6)
    assert timers.collect() == {"time/rollout": 0, "time/step": 6} and undocumented(metrics) == []


def test_the_progress_line() -> None:
    now = iter([100.0, 110.0, 120.0, 140.0])
    out = io.StringIO()
    progress = Progress(total_steps=64, first_step=3, stream=out, clock=lambda: next(now))
    values = {
        "rollout/rewards": -1.25,
        "rollout/accuracy": 0.375,
        "rollout/response_length": 18.2,
        "train/entropy_loss": 0.61234,
        "perf/tokens_per_second": 1812.4,
    }
    progress.step(3, values)
    quiet = {"train/minibatches_skipped": 0.0, "rollout/verdict_undecided": 0.1, "rollout/own_parts_failed": 0.0}
    progress.step(3, values | quiet)
    loud = {"train/minibatches_skipped": 1.0, "rollout/verdict_undecided": 1.0, "rollout/own_parts_failed": 0.25}
    progress.step(4, values | loud)
    first, again, last = out.getvalue().splitlines()
    assert first == "step 3/64  reward -1.25  accuracy 0.375  length 18.2  entropy 0.612  tokens/s 1,812  ETA 10:10"
    assert "skipped" not in again and "undecided" not in again and "failed" not in again
    assert last.endswith("skipped 1  undecided 100%  own parts failed 25%  ETA 20:00")  # 20 s a step, 60 steps to go
    assert [duration(s) for s in (9, 309, 3909)] == ["0:09", "5:09", "1:05:09"]


def test_paired_gain_of_known_outcomes() -> None:
    before, after = np.array([0.0] * 60 + [1.0] * 40), np.array([1.0] * 30 + [0.0] * 30 + [1.0] * 40)
    gain = paired_gain(before, after)
    assert gain.value == pytest.approx(0.3)
    sigma = math.sqrt(0.3 * 0.7 / 100)
    assert (gain.low, gain.high) == pytest.approx((0.3 - 1.96 * sigma, 0.3 + 1.96 * sigma), abs=0.015)
    assert paired_gain(before, after) == gain
    assert paired_gain(before, before) == (0, 0, 0)
    with pytest.raises(ValueError, match="paired"):
        paired_gain(before, after[:-1])


def test_the_interval_of_the_gain_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        before, after = (rng.random(200) < p for p in (0.4, 0.55))
        gain = paired_gain(before.astype(float), after.astype(float), seed=trial)
        hits += gain.low <= 0.15 <= gain.high
    assert 52 <= hits <= 60


def test_wilson_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    assert math.isnan(wilson(0, 0).value)


def test_the_closing_table_names_the_gain_and_the_command() -> None:
    ones = np.ones(100)
    before = Scores(np.array([1.0] * 40 + [0.0] * 60), ones, 20 * ones)
    after = Scores(np.array([1.0] * 65 + [0.0] * 35), ones, 18 * ones)
    out = io.StringIO()
    show_summary(before, after, "./logs", Console(file=out, width=120))
    text = out.getvalue()
    assert "40.0 [30.9, 49.8]" in text and "65.0" in text and re.search(r"\+25\.0 \[\+1\d\.\d, \+3\d\.\d\]", text)
    assert "tensorboard --logdir ./logs --port 6006" in text


def test_every_metric_says_what_it_is_and_the_page_is_up_to_date() -> None:
    assert all(m.meaning and m.healthy and m.action for m in METRICS.values())
    assert undocumented(["rollout/rewards", "time/anything", "train/nope"]) == ["train/nope"]
    assert (ROOT / "docs/metrics.md").read_text() == markdown(), "run: python -m rlinf.metrics.names > docs/metrics.md"
