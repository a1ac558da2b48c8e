"""`rlinf compare` on a real run, on copies of it with one planted difference, and on real runs that differ in one setting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlinf.cli import main
from rlinf.config.keys import known_keys
from rlinf.config.load import load, value_of
from rlinf.errors import UserError
from rlinf.record_files import whole_lines
from rlinf.report.compare import Comparison, Difference, compare, describe, read_run, within
from tests.tiny import make_tiny_model
from tests.tiny_run import run, write_run

ONE_PROCESS = {
    "cluster__backend": "local",
    "cluster__num_gpus_per_node": 1,
    "cluster__component_placement": {"actor,rollout,reward": "0"},
    "actor__model__tensor_model_parallel_size": 1,
    "actor__model__pipeline_model_parallel_size": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    done = run(write_run(folder, "base", **ONE_PROCESS))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "logs" / "base"


def edit_lines(file: Path, change: Callable[[dict], None]) -> None:
    rows = [json.loads(line) for line in whole_lines(file)[0]]
    for row in rows:
        change(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edited(base: Path, tmp_path: Path, file: str, change: Callable[[dict], None]) -> Path:
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(base, copy, symlinks=True)
    edit_lines(copy / file, change)
    return copy


def set_config(folder: Path, line: str, new: str) -> None:
    """As if the run had been made with it."""
    text = (folder / "config.yaml").read_text()
    assert line in text
    (folder / "config.yaml").write_text(text.replace(line, new))
    config = load(str(folder / "config.yaml")).config
    edit_lines(folder / "environment.jsonl", lambda row: row.update(settings={key: value_of(config, key) for key in known_keys()}))


def of(a: Path, b: Path, tolerance: float = 1e-6) -> Comparison:
    return compare(read_run(a), read_run(b), tolerance)


def likely(c: Comparison) -> list[str]:
    return [x.name for x in c.candidates if x.likely]


def at_step(step: int, change: dict) -> Callable[[dict], None]:
    return lambda row: row.update(change) if row["step"] == step else None


def test_a_run_agrees_with_itself(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = of(base, base)
    assert c.divergence is None and c.rounding is None and c.common_steps == 4 and c.weights == {2: True, 3: True}
    assert main(["compare", str(base), str(base)]) == 0
    assert "agree on all 4 common steps, to the last bit" in capsys.readouterr().out


def test_a_metric_that_parts_is_named_with_step_and_both_values(base: Path, tmp_path: Path) -> None:
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(2, {"train/grad_norm": 0.5, "time/step": 99.0}))
    c = of(base, copy)
    assert c.divergence is not None and (c.divergence.step, c.divergence.stage, c.divergence.what) == (2, "training", "train/grad_norm")
    assert c.divergence.b == 0.5 and c.also == () and c.candidates == ()
    assert "no recorded difference explains it" in describe(c) and "train/grad_norm" in describe(c)


def test_rounding_is_told_apart_from_divergence(base: Path, tmp_path: Path) -> None:
    value = read_run(base).metrics_by_step[1]["train/entropy_loss"]
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(1, {"train/entropy_loss": value * (1 + 1e-8)}))
    set_config(copy, "tensor_model_parallel_size: 1", "tensor_model_parallel_size: 2")
    c = of(base, copy)
    assert c.divergence is None and c.rounding is not None and c.rounding.what == "train/entropy_loss"
    assert likely(c) == ["actor.model.tensor_model_parallel_size"]
    assert "agree on all 4 common steps, but for rounding" in describe(c)
    assert of(base, copy, tolerance=1e-12).divergence is not None


def test_small_values_are_compared_relative_to_themselves() -> None:
    def differ(name: str, a: float, b: float) -> bool:
        return not within(Difference(1, "training", name, a, b), 1e-6)

    assert differ("train/kl_loss", 2e-7, 9e-7) and differ("train/lr", 1e-6, 2e-6)
    assert not differ("train/loss", 3e-4, 3.0002e-4) and differ("train/loss", 3e-4, 3.1e-4)  # terms of size 1 that nearly cancel
    assert not differ("train/rollout_logprob_gap_max", 1e-7, 3e-7) and differ("train/rollout_logprob_gap_max", 1e-5, 3e-5)


@pytest.mark.parametrize(
    ("change", "stage", "line", "new", "cause"),
    [
        ({"response": "else"}, "generation", "temperature: 1.0", "temperature: 0.9", "algorithm.sampling_params.temperature"),
        ({"status": "right"}, "verdicts", "answer_format: boxed", "answer_format: boxed_or_final_number", "reward.answer_format"),
        ({"prompt": "another"}, "data", "seed: 1234", "seed: 5", "data.seed"),
    ],
)
def test_the_stage_tells_the_cause_from_other_differences(
    base: Path, tmp_path: Path, change: dict, stage: str, line: str, new: str, cause: str
) -> None:
    """lr differs too, but it cannot act before the first update."""
    copy = edited(base, tmp_path, "samples/step_000001.jsonl", lambda row: row.update(change))
    set_config(copy, line, new)
    set_config(copy, "lr: 0.001", "lr: 0.002")
    c = of(base, copy)
    assert c.divergence is not None and (c.divergence.step, c.divergence.stage) == (1, stage)
    assert likely(c) == [cause] and "actor.optim.lr" not in describe(c)


def test_generation_that_parts_later_points_to_training(base: Path, tmp_path: Path) -> None:
    copy = edited(base, tmp_path, "samples/step_000002.jsonl", lambda row: row.update(response="else"))
    set_config(copy, "weight_decay: 0.05", "weight_decay: 0.1")
    set_config(copy, "  temperature: 1.0", "  temperature: 0.9")
    c = of(base, copy)
    assert c.divergence is not None and (c.divergence.step, c.divergence.stage) == (2, "generation")
    assert likely(c) == ["actor.optim.weight_decay"] and "algorithm.sampling_params.temperature" in describe(c)


def test_a_difference_that_should_act_later_is_still_named_when_there_is_no_other(base: Path, tmp_path: Path) -> None:
    copy = edited(base, tmp_path, "samples/step_000001.jsonl", lambda row: row.update(prompt="another"))
    set_config(copy, "lr: 0.001", "lr: 0.002")
    assert likely(of(base, copy)) == ["actor.optim.lr"]


def test_a_file_of_the_users_own_is_a_cause_where_its_key_acts(base: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", edited(base, tmp_path, "metrics.jsonl", at_step(1, {"train/grad_norm": 3.0}))
    shutil.copytree(base, one, symlinks=True)
    for folder, content in ((one, "00ff"), (other, "11ff")):
        code = {
            "algorithm.loss_type mine.py:loss": content,
            "reward.own_tasks mine.py:judge": content,
            "reward.own_parts same.py:part": "22",
        }
        edit_lines(folder / "environment.jsonl", lambda row: row.update(own_code=code))
    set_config(other, "  normalize_advantages: true", "  normalize_advantages: false")
    found = of(one, other)
    assert likely(found) == ["algorithm.normalize_advantages", "the file of algorithm.loss_type mine.py:loss"]
    assert "reward.own_tasks mine.py:judge" in describe(found) and "same.py" not in describe(found)


def test_versions_weights_and_resumptions_are_causes(base: Path, tmp_path: Path) -> None:
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(1, {"rollout/response_length": 3.0}))
    edit_lines(copy / "environment.jsonl", lambda row: row["packages"].update(torch="1.0"))
    assert likely(of(base, copy)) == ["version of torch"]
    edit_lines(copy / "environment.jsonl", lambda row: row.update(weights="00ff"))
    set_config(copy, "experiment_name: base", "experiment_name: other")
    assert likely(of(base, copy)) == ["weights at the start"] and "experiment_name" not in describe(of(base, copy))
    start = json.loads((copy / "environment.jsonl").read_text())
    (copy / "environment.jsonl").write_text("".join(json.dumps(start | {"first_step": k}) + "\n" for k in (1, 2)))
    shutil.copy(base / "metrics.jsonl", copy)
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(2, {"rollout/response_length": 3.0}))
    assert "note: B was resumed at step 2, where the runs part" in describe(of(base, copy))


def test_the_settings_are_those_of_the_start_that_made_the_step(base: Path, tmp_path: Path) -> None:
    """A run that goes on with others writes them into config.yaml, which then says nothing of the steps before."""
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(1, {"train/loss": 9.0}))
    (start,) = [json.loads(line) for line in (copy / "environment.jsonl").open()]
    then, later = start["settings"] | {"algorithm.kl_beta": 0.5}, start["settings"] | {"actor.optim.lr": 0.125}
    starts = [start | {"settings": then}, start | {"settings": later, "first_step": 3}]
    (copy / "environment.jsonl").write_text("".join(json.dumps(s) + "\n" for s in starts))
    assert likely(of(base, copy)) == ["algorithm.kl_beta"]
    shutil.copy(base / "metrics.jsonl", copy)
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(3, {"train/loss": 9.0}))
    assert likely(of(base, copy)) == ["actor.optim.lr"]


def test_a_start_that_is_recorded_with_its_settings_is_as_one_that_is_not(base: Path, tmp_path: Path) -> None:
    copy = edited(base, tmp_path, "environment.jsonl", lambda row: row.pop("settings"))
    edit_lines(copy / "metrics.jsonl", at_step(1, {"train/loss": 9.0}))
    assert of(base, copy).candidates == ()


def test_a_moved_model_folder_is_no_cause_when_the_weights_are_the_same(base: Path, tmp_path: Path) -> None:
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(1, {"rollout/response_length": 3.0}))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(base.parents[1] / "model"), "/elsewhere/model"))
    assert of(base, copy).candidates == ()
    (copy / "environment.jsonl").unlink()
    c = of(base, copy)
    assert likely(c) == ["rollout.model_dir"] and any("B has no environment.jsonl" in note for note in c.notes)


def test_runs_of_different_length_and_metrics_of_one_run(base: Path, tmp_path: Path) -> None:
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(3, {"train/new": 1.0}))
    c = of(base, copy)
    assert c.divergence is not None and (c.divergence.step, c.divergence.what, c.divergence.a) == (3, "train/new", None)
    lines = whole_lines(copy / "metrics.jsonl")[0]
    (copy / "metrics.jsonl").write_text("".join(lines[:2]))
    c = of(base, copy)
    assert c.divergence is None and c.common_steps == 2 and c.steps == (3, 1)
    (copy / "metrics.jsonl").write_text(json.dumps({"step": 9, "train/loss": 0.0}) + "\n")
    assert "no step in common" in describe(of(base, copy))


def test_json_holds_the_same(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = edited(base, tmp_path, "metrics.jsonl", at_step(2, {"train/loss": 7.0}))
    assert main(["compare", str(base), str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["divergence"]["step"] == 2 and found["divergence"]["b"] == 7.0 and found["weights"] == {"2": True, "3": True}


def test_what_is_no_run_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(base), str(tmp_path)]) == 2
    assert f"{tmp_path}: no config.yaml, so no run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("runner: {}\n")
    assert main(["compare", str(tmp_path), str(base)]) == 2
    assert "ended before its first step" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "config.yaml").write_text("runner: [\n")
    assert main(["compare", str(tmp_path), str(base)]) == 2
    assert "not valid YAML" in capsys.readouterr().err


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for text in ("", "[1]\n", "runner\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="config.yaml: holds no settings"):
            read_run(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match="config.yaml: not valid YAML: unacceptable character"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("runner: {seed: 1}\n")
    (tmp_path / "environment.jsonl").write_text('{"first_step": 1}\n\0\0\n')
    with pytest.raises(UserError, match="environment.jsonl, line 2: not JSON"):
        read_run(tmp_path)


@pytest.mark.slow
def test_real_runs_that_differ_in_one_setting(base: Path) -> None:
    folder = base.parents[1]
    planted = {
        "same": ([], None, []),
        "order": (["data.seed=7"], (1, "data"), ["data.seed"]),
        "heat": (["algorithm.sampling_params.temperature=0.7"], (1, "generation"), ["algorithm.sampling_params.temperature"]),
        "noise": (["rollout.seed=7"], (1, "generation"), ["rollout.seed"]),
        "reward": (["reward.reward_scale=3.0"], (0, "verdicts"), ["reward.reward_scale"]),
        "decay": (["actor.optim.weight_decay=5.0"], (1, "training"), ["actor.optim.weight_decay"]),
    }
    for name, (words, where, causes) in planted.items():  # verdicts differ in the validation before step 1 already
        done = run(folder / "base.yaml", f"runner.experiment_name={name}", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        c = of(base, folder / "logs" / name)
        if name == "same":
            assert c.divergence is None and c.rounding is None and all(c.weights.values())
            continue
        assert c.divergence is not None and likely(c) == causes, name
        assert (c.divergence.step, c.divergence.stage) == where, name

    make_tiny_model(folder / "model", "qwen2-tied", seed=1)  # another model under the same path
    done = run(folder / "base.yaml", "runner.experiment_name=weights")
    assert done.returncode == 0, done.stderr[-3000:]
    c = of(base, folder / "logs" / "weights")
    assert c.divergence is not None and likely(c) == ["weights at the start"] and not any(c.weights.values())
