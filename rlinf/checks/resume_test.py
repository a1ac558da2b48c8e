"""`rlinf check resume` holds, and it would notice a step lost, a sample trained twice or skipped,
a weight, a moment or a curve that differs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlinf.checks.killing import Kill, Life, newest_checkpoint, plan_kills
from rlinf.checks.resume import CHAINS, CURVES, Death, compare, compare_samples
from rlinf.run_paths import COMPLETE
from rlinf.weights.checkpoint_part import KINDS, write_index
from rlinf.weights.tensor_folder import write_tensors

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2


def test_a_call_kills_twenty_times_in_the_places_that_matter() -> None:
    kinds = Counter(kind for chain in CHAINS for kind in chain.kills)
    assert sum(kinds.values()) == 20 and kinds["checkpoint"] >= 5 and kinds["sync"] >= 2
    assert sum(len(c.kills) for c in CHAINS if c.layout.startswith("Ray")) >= 5 and any(c.background for c in CHAINS)


@pytest.mark.parametrize("seed", range(20))
def test_kills_are_drawn_from_the_seed_and_rise_through_the_run(seed: int) -> None:
    kinds, victims = ("random", "sync", "checkpoint", "random", "start"), ("driver", "actor-0")
    kills = plan_kills(kinds, 14, victims, seed)
    assert kills == plan_kills(kinds, 14, victims, seed) != plan_kills(kinds, 14, victims, seed + 1)
    assert Counter(k.kind for k in kills) == Counter(kinds) and kills[0].kind == "start"
    steps = [k.step for k in kills]
    assert steps == sorted(steps) and 1 <= steps[0] and steps[-1] <= 11  # a later sign will do when one is missed
    assert all(k.victim == "driver" for k in kills if k.kind != "random")


def finished_run(folder: Path) -> Path:
    """What compare() reads of a run of two steps."""
    actor = folder / "checkpoints" / "step_000002" / "actor"
    tensors = {kind: {"a": torch.full((2, 2), 0.5 + i), "b": torch.ones(3)} for i, kind in enumerate(KINDS)}
    write_index(actor, 0, {kind: write_tensors(actor, kind, tensors[kind].items()) for kind in KINDS})
    (folder / "checkpoints" / "latest").symlink_to("step_000002")
    (folder / "samples").mkdir()
    for step in range(1, STEPS + 1):
        (folder / "samples" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples(step)))
    lines = [{"step": step, "time": 0.0} | dict.fromkeys(CURVES, step / 10) for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def samples(step: int) -> list[dict[str, Any]]:
    return [{"sample_id": f"{step}.p/{k}", "response": "x", "reward": 1.0, "versions": [[step - 1, 1]], "finish": "stop"} for k in range(3)]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A run, the reference, and the model that both began with."""
    (tmp_path / "model").mkdir()
    save_file({"a": torch.zeros(2, 2), "b": torch.ones(3)}, tmp_path / "model" / "model.safetensors")
    return finished_run(tmp_path / "run"), finished_run(tmp_path / "reference"), tmp_path / "model"


def test_equal_runs_hold(runs: tuple[Path, Path, Path]) -> None:
    ending = compare("x", *runs, STEPS, 0.0)
    assert ending.holds and ending.weights == ending.moments == 0 and ending.moved == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_of_a_weight_or_moment_is_seen(runs: tuple[Path, Path, Path], kind: str) -> None:
    actor = runs[0] / "checkpoints" / "step_000002" / "actor"
    value = torch.full((2, 2), 0.5 + KINDS.index(kind))
    value[1, 1] = torch.nextafter(value[1, 1], torch.tensor(9.0))
    index = json.loads((actor / "index-s0.json").read_text())
    index[kind] = write_tensors(actor, "other", {"a": value, "b": torch.ones(3)}.items())
    write_index(actor, 0, index)
    assert not compare("x", *runs, STEPS, 0.0).holds
    assert compare("x", *runs, STEPS, 1e-6).holds  # another layout may round differently


def test_a_training_that_moved_nothing_proves_nothing(runs: tuple[Path, Path, Path]) -> None:
    save_file({"a": torch.full((2, 2), 0.5), "b": torch.ones(3)}, runs[2] / "model.safetensors")
    assert not compare("x", *runs, STEPS, 0.0).holds


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@pytest.mark.parametrize(("step", "lines", "words"), [
    (2, [0, 1, 2, 2], "sample 2.p/2 2 times"), (2, [0, 1], "sample 2.p/2 was skipped"), (1, [], "sample 1.p/0 was skipped"),
])  # fmt: skip
def test_a_sample_trained_twice_or_skipped_is_seen(
    runs: tuple[Path, Path, Path], step: int, lines: list[int], words: str, tolerance: float
) -> None:
    (runs[0] / "samples" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(samples(step)[k]) + "\n" for k in lines))
    ending = compare("x", *runs, STEPS, tolerance)
    assert not ending.holds and any(words in line for line in ending.wrong)


def test_a_sample_of_another_step_and_another_text_are_seen() -> None:
    other = samples(1)[:2] + [samples(1)[2] | {"response": "y"}]
    assert compare_samples(1, other, samples(1), texts=True) == ["step 1: sample 1.p/2 differs"]
    assert compare_samples(1, other, samples(1), texts=False) == []
    assert "step 1: sample 2.p/0 does not belong here" in compare_samples(1, samples(2), samples(1), texts=True)


@pytest.mark.parametrize("damage", ["value", "missing", "twice"])
def test_another_curve_is_seen(runs: tuple[Path, Path, Path], damage: str) -> None:
    file = runs[0] / "metrics.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(
        {"value": first + second.replace("0.2", "0.20000000000000004"), "missing": second, "twice": first + second + second}[damage]
    )
    assert not compare("x", *runs, STEPS, 0.0).holds


def test_a_lost_step_is_seen() -> None:
    death = Death("x", Kill("random", 5, 0.5), "after step 5", last_step=5, resumed_at=4, newest=4, allowed=1, seconds=1.0)
    assert death.holds and death.lost == 1
    assert not Death(**vars(death) | {"newest": 6}).holds  # a complete checkpoint was passed over
    assert not Death(**vars(death) | {"resumed_at": 2, "newest": 2}).holds  # a checkpoint that should be there is not


def test_signs_are_of_this_run_and_of_what_is_not_complete(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("run check-of-signs in /x, goes on after step 4\n")
    life = Life(tmp_path / "x", None, log)  # type: ignore[arg-type]  (no process: only looks)
    partial = tmp_path / "x" / "checkpoints" / "step_000006.partial"
    (partial / "actor").mkdir(parents=True)
    (partial / "actor" / "weights").touch()
    assert life.resumed_at() == 4 and newest_checkpoint(life.run_dir) == 0
    assert life.checkpoint_sign(Kill("checkpoint", 6, 0.19)) == "checkpoint of step 6, 1 files written"
    assert not life.checkpoint_sign(Kill("checkpoint", 7, 0.0)) and not life.checkpoint_sign(Kill("checkpoint", 6, 0.2))
    (partial / COMPLETE).touch()
    assert newest_checkpoint(life.run_dir) == 0
    partial.rename(partial.with_suffix(""))
    assert newest_checkpoint(life.run_dir) == 6 and not life.checkpoint_sign(Kill("checkpoint", 0, 0.0))
    assert not life.sync_sign(Kill("sync", 0, 0.0))
    segment = Path("/dev/shm/rlinf-check-of-signs-s0-v5-0")
    segment.touch()
    seen = [life.sync_sign(Kill("sync", step, 0.0)) for step in (5, 6)]
    segment.unlink()
    assert seen == ["weight sync 5", ""]


@pytest.mark.slow
def test_the_command_holds_in_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlinf", "check", "resume", "--quick", "--seed", "3", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["holds"] and len(report["kills"]) == 5 and [e["weights"] for e in report["ends"]] == [0.0]
