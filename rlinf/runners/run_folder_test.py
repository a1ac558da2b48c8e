"""A run's folder: nothing of somebody else's is touched, and a checkpoint is complete or absent."""

import os
from pathlib import Path

import pytest

from rlinf.config.load import load
from rlinf.errors import UserError
from rlinf.runners.run_folder import COMPLETE, RunFolder


def open_folder(tmp_path: Path, *words: str) -> RunFolder:
    return RunFolder(load("smollm2-135m-grpo-cpu", [f"runner.output_dir={tmp_path}", "runner.experiment_name=run", "runner.keep_checkpoints=2", *words]))


def close(folder: RunFolder) -> None:
    folder._lock.close()


def checkpoint(folder: RunFolder, step: int) -> Path:
    partial = folder.begin_checkpoint(step)
    (partial / "weights").write_text(str(step))
    return folder.finish_checkpoint(partial, {"step": step})


def with_steps(folder: RunFolder) -> None:
    (folder.path / "metrics.jsonl").write_text('{"step": 0}\n')


def test_a_new_folder_holds_the_resolved_configuration(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    assert not folder.continues and folder.resume is None
    assert "experiment_name: run" in (folder.path / "config.yaml").read_text()


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="thesis.tex but no run of rlinf"):
        open_folder(tmp_path)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("finished, words", [(True, "has finished"), (False, "stopped before its end")])
def test_a_run_is_never_overwritten(tmp_path: Path, finished: bool, words: str) -> None:
    folder = open_folder(tmp_path)
    with_steps(folder)
    if finished:
        folder.finish()
    close(folder)
    before = (folder.path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=words) as error:
        open_folder(tmp_path, "actor.optim.lr=1")
    assert "runner.resume_dir=auto" in str(error.value) and "runner.experiment_name" in str(error.value)
    assert (folder.path / "config.yaml").read_bytes() == before


def test_a_start_that_failed_before_its_first_step_may_be_repeated(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    (folder.path / "metrics.jsonl").touch()
    close(folder)
    assert not open_folder(tmp_path).continues


def test_two_drivers_cannot_share_a_folder(tmp_path: Path) -> None:
    first = open_folder(tmp_path)
    with pytest.raises(UserError, match="another run is writing here now"):
        open_folder(tmp_path)
    close(first)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; test_a_path_that_cannot_be_a_folder covers the message")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="runner.output_dir"):
        open_folder(tmp_path)


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="runner.output_dir: cannot create"):
        open_folder(tmp_path / "file")


def test_latest_points_to_the_newest_complete_checkpoint_and_old_ones_go(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for step in (1, 2, 3):
        checkpoint(folder, step)
    folder.begin_checkpoint(4)  # interrupted
    with_steps(folder)
    close(folder)
    assert sorted(p.name for p in folder.checkpoints.glob("step_??????")) == ["step_000002", "step_000003"]
    resumed = open_folder(tmp_path, "runner.resume_dir=auto")
    assert resumed.continues and resumed.resume is not None and resumed.resume.step == 3


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    step_dir = checkpoint(folder, 1)
    (step_dir / COMPLETE).unlink()
    close(folder)
    with pytest.raises(UserError, match="incomplete"):
        open_folder(tmp_path, f"runner.resume_dir={step_dir}")
    with pytest.raises(UserError, match="not a checkpoint"):
        open_folder(tmp_path, f"runner.resume_dir={tmp_path}")


def test_samples_of_repeated_steps_are_set_aside_not_lost_nor_mixed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    checkpoint(folder, 1)
    with_steps(folder)
    folder.samples(1).parent.mkdir()
    for step in (1, 2):
        folder.samples(step).write_text(f"old {step}")
    close(folder)
    open_folder(tmp_path, "runner.resume_dir=auto")
    assert folder.samples(1).read_text() == "old 1" and not folder.samples(2).exists()
    assert (folder.samples(2).parent / "step_000002.jsonl.replaced-1").read_text() == "old 2"
