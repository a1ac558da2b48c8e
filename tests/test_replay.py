"""A journalled step runs again from disk with the same numbers; and each half of a run runs without the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlinf.cli import main
from rlinf.data.journal import read_groups
from tests.tiny_run import ONE_PROCESS, lines, write_run

LAYOUT = [
    "cluster.backend=ray",
    "cluster.num_gpus_per_node=2",
    "cluster.component_placement={actor: 0-1, 'rollout,reward': 0}",
    "actor.model.tensor_model_parallel_size=2",
]

VARIED: dict[str, object] = {  # every answer is wrong, but they end at chance, and short ones cost
    "reward__exploration_penalty": 1.0, "algorithm__sampling_params": {"max_new_tokens": 16, "stop": list("abcdefghijklmnop")},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps; of the checkpoints only that of step 2 is left, for step 3."""
    folder = tmp_path_factory.mktemp("replay")
    config = write_run(
        folder,
        runner__max_steps=4,
        runner__val_check_interval=0,
        runner__save_interval=2,
        runner__keep_checkpoints=0,
        **VARIED,
        **ONE_PROCESS,
    )
    assert main(["train", str(config)]) == 0
    assert all(m["train/grad_norm"] > 0 for m in lines(folder))
    return folder


@pytest.fixture
def run_dir(folder: Path) -> Path:
    return folder / "logs" / "tiny"


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_trained_again_has_the_recorded_numbers_to_the_last_bit(
    run_dir: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(run_dir), "--step", str(step), "--tolerance", "0"]) == 0
    shown = capsys.readouterr().out
    assert "train/loss" in shown and "rollout/rewards" in shown and "with the recorded samples" in shown
    assert ("the start model" if step == 1 else "checkpoint step_000002") in shown
    assert not list((run_dir / "replays").glob("*/samples/step_*"))  # nothing was generated


def test_a_run_of_sft_has_nothing_to_replay_and_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "sft/loss": 2.0}\n')
    (tmp_path / "config.yaml").write_text("")
    assert main(["replay", str(tmp_path), "--step", "1"]) == 2
    assert f"{tmp_path}: is a run of `rlinf sft`, which generates nothing" in capsys.readouterr().err


def test_generated_again_a_step_has_the_recorded_numbers_too(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run_dir), "--step", "3", "--rollout", "--tolerance", "0"]) == 0
    assert "with samples generated again" in capsys.readouterr().out
    again = max((run_dir / "replays").glob("step_000003*"), key=lambda p: p.stat().st_mtime)
    responses = [
        {r["sample_id"]: r["response"] for r in map(json.loads, (d / "samples" / "step_000003.jsonl").open())} for d in (run_dir, again)
    ]
    assert responses[0] == responses[1]


def test_a_step_is_made_with_the_settings_that_it_had_when_the_run_has_gone_on_with_others(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, starts = run_dir / "config.yaml", run_dir / "environment.jsonl"
    before, recorded = file.read_text(), starts.read_text()
    (line,) = [line for line in before.splitlines() if line.startswith("  loss_type: ")]
    file.write_text(before.replace(line, "  loss_type: gspo"))
    start = json.loads(recorded)
    start["settings"]["runner.profile_ranks"] = [0, 1]  # as a word of now it would be refused: a replay profiles nothing
    starts.write_text(json.dumps(start) + "\n")
    try:
        assert main(["replay", str(run_dir), "--step", "3", "--tolerance", "0"]) == 0
    finally:
        file.write_text(before)
        starts.write_text(recorded)
    assert "train/first_minibatch_clip_fraction" in capsys.readouterr().out  # whole, where there is no screen


def test_what_differs_is_named_and_is_the_exit_code(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run_dir), "--step", "3", "algorithm.entropy_bonus=0.5"]) == 1
    last = [line for line in capsys.readouterr().out.splitlines() if "beyond it" in line]
    assert "train/grad_norm" in last[0] and "rollout/rewards" not in last[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward.exploration_penalty=2"], "has no effect where the recorded samples are trained on; add --rollout"),
        (["algorithm.sampling_params.top_p=0.5"], "has no effect where the recorded samples"),
        (["runner.max_steps=4"], "a replay sets it by itself"),
        (["--rollout", "data.val_data_paths=[]"], "has no effect on a step that runs again"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    before = list((run_dir / "replays").glob("*"))
    assert main(["replay", str(run_dir), "--step", "3", *words]) == 2
    assert capsys.readouterr().err.startswith(f"rlinf: {words[-1].partition('=')[0]}: {said}")
    assert list((run_dir / "replays").glob("*")) == before


def test_without_the_checkpoint_the_steps_that_can_be_replayed_are_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run_dir), "--step", "4"]) == 2
    err = capsys.readouterr().err
    assert "no complete checkpoint of step 3" in err and "can be replayed: 1, 3;" in err and "--from-start" in err
    assert main(["replay", str(run_dir), "--step", "9"]) == 2 and "it has 1-4" in capsys.readouterr().err
    assert main(["replay", str(run_dir), "--step", "4", "--from-start"]) == 1  # other weights than then: other numbers


def test_only_the_rollout_half(folder: Path) -> None:
    config = write_run(folder, "half", runner__max_steps=2, **VARIED, **ONE_PROCESS)
    assert main(["train", str(config), "--debug-rollout-only"]) == 0
    run_dir = folder / "logs" / "half"
    metrics = lines(folder, "half")
    assert [m["step"] for m in metrics] == [1, 2] and all("rollout/rewards" in m and "train/loss" not in m for m in metrics)
    assert len(list(read_groups(run_dir / "samples" / "groups_000002.jsonl"))) == 4 and not list((run_dir / "checkpoints").glob("step_*"))
    assert metrics[0]["rollout/rewards"] == lines(folder)[0]["rollout/rewards"]  # the first step of the whole run
    assert set(json.loads((run_dir / "status.json").read_text())["components"]) == {"rollout", "reward"}


def test_only_the_training_half(folder: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(folder, "trained", runner__max_steps=-1, runner__save_interval=3, **VARIED, **ONE_PROCESS)
    assert main(["train", str(config), "--debug-train-only", str(run_dir)]) == 0
    whole, half = lines(folder), lines(folder, "trained")
    assert [m["step"] for m in half] == [1, 2, 3, 4]
    assert all(a["train/loss"] == b["train/loss"] and a["train/grad_norm"] == b["train/grad_norm"] for a, b in zip(whole, half))
    assert main(["train", str(config), "--debug-train-only", str(run_dir), "runner.resume_dir=auto"]) == 2  # it is at its end
    assert "nothing behind step 4" in capsys.readouterr().err
    resumed = folder / "logs" / "trained" / "checkpoints" / "step_000003"
    assert main(["train", str(config), "--debug-train-only", str(run_dir), f"runner.resume_dir={resumed}"]) == 0
    assert lines(folder, "trained")[3]["train/loss"] == whole[3]["train/loss"]
    assert main(["train", str(config), "--debug-train-only", str(folder), "runner.experiment_name=none"]) == 2
    assert "no step of this run is journalled" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_on_another_layout_has_the_recorded_numbers_but_for_rounding(run_dir: Path) -> None:
    assert main(["replay", str(run_dir), "--step", "3", *LAYOUT]) == 0
