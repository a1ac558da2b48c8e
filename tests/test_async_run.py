"""Whole runs whose engines are ahead of the actor: reproducible where that is promised, and complete, also over a resumption."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlinf.cli import main
from tests.tiny_run import ONE_PROCESS, lines, run, write_run

STEPS = 5
AHEAD: dict[str, object] = ONE_PROCESS | {
    "runner__max_steps": STEPS,
    "runner__val_check_interval": 0,
    "runner__keep_checkpoints": 0,
    "cluster__device": "cpu",
}


def weights(folder: Path, name: str, step: int) -> dict[str, bytes]:
    found = load_file(folder / "logs" / name / "checkpoints" / f"step_{step:06d}" / "hf" / "model.safetensors")
    return {key: tensor.numpy().tobytes() for key, tensor in found.items()}


def trained(folder: Path, name: str) -> list[list[str]]:
    """The samples of each step."""
    tokens = [folder / "logs" / name / "samples" / f"tokens_{step:06d}.jsonl" for step in range(1, STEPS + 1)]
    return [sorted(json.loads(line)["sample_id"] for line in file.open()) for file in tokens]


def check_complete(folder: Path, name: str) -> None:
    samples = [s for step in trained(folder, name) for s in step]
    assert len(samples) == len(set(samples)) == 16 * STEPS


def test_logical_runs_are_equal_to_the_bit_also_after_a_resumption(tmp_path: Path) -> None:
    """The checkpoint of step 2 holds the batches that were generated ahead."""
    config = write_run(tmp_path, "whole", algorithm__max_staleness=2, **AHEAD)
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [m["rollout/staleness_max"] for m in lines(tmp_path, "whole")] == [0, 1, 2, 2, 2]
    waiting = tmp_path / "logs/whole/checkpoints/step_000002/waiting"
    assert len(list(waiting.iterdir())) == 2 * 4
    others = {"runner__resume_dir": str(waiting.parent), "runner__phase_timeout": 777}
    again = run(write_run(tmp_path, "again", algorithm__max_staleness=2, **others, **AHEAD))
    assert again.returncode == 0, again.stderr[-4000:]
    assert [line for line in again.stderr.splitlines() if ", now " in line] == ["  runner.phase_timeout: 0, now 777"]
    first, second = ({m["step"]: m for m in lines(tmp_path, name)} for name in ("whole", "again"))
    for step in (3, 4, 5):
        assert all(first[step][k] == second[step][k] for k in first[step] if k.startswith(("train/", "rollout/")) and "tokens_per" not in k)
    assert weights(tmp_path, "whole", STEPS) == weights(tmp_path, "again", STEPS)
    assert all(m["train/grad_norm"] > 0 for m in first.values())
    check_complete(tmp_path, "whole")
    assert [samples(tmp_path, "again", step) for step in (3, 4, 5)] == [samples(tmp_path, "whole", step) for step in (3, 4, 5)]
    for step in (3, 4):  # whose groups came with the checkpoint: the branch has their journal too
        files = [tmp_path / "logs" / name / "samples" / f"groups_{step:06d}.jsonl" for name in ("whole", "again")]
        assert sorted(files[0].open()) == sorted(files[1].open())


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0, 1])
def test_two_logical_runs_of_one_seed_are_equal_to_the_bit(tmp_path: Path, eta: int) -> None:
    """Samples, metrics and weights; and those of another seed are not."""
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        words = {"algorithm__max_staleness": eta, "rollout__seed": seed, "data__seed": seed}
        done = run(write_run(tmp_path, name, **words, **AHEAD))
        assert done.returncode == 0, done.stderr[-4000:]
    first, second, other = ([weights(tmp_path, name, STEPS), [samples(tmp_path, name, s) for s in range(1, STEPS + 1)]] for name in
                            ("first", "second", "other"))  # fmt: skip
    assert first == second and first[0] != other[0] and first[1] != other[1]
    assert all(m["train/grad_norm"] > 0 for m in lines(tmp_path, "first"))
    for a, b in zip(lines(tmp_path, "first"), lines(tmp_path, "second"), strict=True):
        assert all(a[k] == b[k] for k in a if k.startswith(("train/", "rollout/")) and "tokens_per" not in k)


def samples(folder: Path, name: str, step: int) -> list[tuple[str, str]]:
    """(sample, response) as they were judged for the step."""
    file = folder / "logs" / name / "samples" / f"step_{step:06d}.jsonl"
    return sorted((row["sample_id"], row["response"]) for row in map(json.loads, file.open()))


def check_replays(run_dir: Path, steps: list[int]) -> None:
    """What the clock decided is in the journal: trained on again, a step has the recorded numbers to the last bit."""
    for step in steps:
        assert main(["replay", str(run_dir), "--step", str(step), "--tolerance", "0"]) == 0
    assert main(["replay", str(run_dir), "--step", str(steps[0]), "--rollout"]) == 2  # the clock does not run twice


@pytest.mark.slow
@pytest.mark.parametrize("partial", [False, True], ids=["interrupted", "carried over"])
def test_wallclock_runs_lose_and_double_nothing(tmp_path: Path, partial: bool) -> None:
    words = {
        "algorithm__max_staleness": 1,
        "algorithm__schedule": "wallclock",
        "rollout__partial": partial,
        "rollout__max_running_requests": 4,
    }
    config = write_run(tmp_path, "wall", algorithm__loss_type="decoupled-ppo", **words, **AHEAD)
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    check_replays(tmp_path / "logs" / "wall", [3, 5])
    steps = lines(tmp_path, "wall")
    assert all(0 <= m["rollout/staleness_max"] <= 1 for m in steps) and steps[-1]["rollout/staleness_max"] == 1
    check_complete(tmp_path, "wall")
    step_dir = tmp_path / "logs/wall/checkpoints/step_000002"
    state = json.loads((step_dir / "run_state.json").read_text())["schedule"]
    before = {name for step in trained(tmp_path, "wall")[:2] for name in step}
    again = run(config, f"runner.resume_dir={step_dir}")
    assert again.returncode == 0, again.stderr[-4000:]
    check_complete(tmp_path, "wall")
    judged = [name for step in range(1, STEPS + 1) for name, _ in samples(tmp_path, "wall", step)]
    assert len(judged) == len(set(judged)) and {name for step in trained(tmp_path, "wall") for name in step} <= {*judged}
    check_replays(tmp_path / "logs" / "wall", [3])
    prompts = Counter(name.split(".")[1].split("/")[0] for step in trained(tmp_path, "wall") for name in step)
    assert set(prompts.values()) == {4}  # 20 of 24 prompts, each with all its samples
    assert {f"{name}/0" for name, _, _ in state["wanted"]}.isdisjoint(before)
    if partial:  # what was carried over went on with its tokens
        versions = [json.loads(line)["versions"] for line in (tmp_path / "logs/wall/samples/step_000003.jsonl").open()]
        assert any(len(v) > 1 for v in versions)
