"""A run's folder: nothing of somebody else's is touched, and a checkpoint is complete or absent."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlinf.config.load import load
from rlinf.errors import UserError
from rlinf.runners.run_folder import COMPLETE, RunFolder, read_checkpoint


def open_folder(tmp_path: Path, *words: str) -> RunFolder:
    return RunFolder(
        load("smollm2-135m-grpo-cpu", [f"runner.output_dir={tmp_path}", "runner.experiment_name=run", "runner.keep_checkpoints=2", *words])
    )


def close(folder: RunFolder) -> None:
    folder._lock.close()


def checkpoint(folder: RunFolder, step: int) -> Path:
    partial = folder.begin_checkpoint(step)
    (partial / "actor").mkdir()
    (partial / "actor" / "weights.safetensors").write_text(str(step))
    (partial / "actor" / "index.json").write_text(json.dumps({"step": step}))
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


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test catches it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, operation: int, work: Callable[[], object]) -> bool:
    """Run `work` and end it before its operation-th change of a folder; whether it had that many."""
    count = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            if count == operation:
                raise Killed
            count += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "fsync", "rename", "replace", "symlink", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except Killed:
            return True
    return False


def sound(folder: Path) -> None:
    """`latest`, if there is one, points to a complete checkpoint with all its files."""
    latest = folder / "run" / "checkpoints" / "latest"
    if latest.is_symlink():
        assert int(latest.resolve().name[-6:]) == read_checkpoint(latest.resolve()).step


@pytest.mark.parametrize("before", [0, 1, 3])
def test_whenever_a_checkpoint_is_interrupted_the_run_goes_on_from_it_or_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    steps, operation, interrupted = set(), 0, True
    while interrupted:
        folder = open_folder(tmp_path)
        for step in range(1, before + 1):
            checkpoint(folder, step)
        interrupted = killed_at(monkeypatch, operation, lambda: checkpoint(folder, before + 1))
        sound(tmp_path)
        close(folder)
        folder = open_folder(tmp_path, "runner.resume_dir=auto")
        at = folder.resume.step if folder.resume else 0
        steps.add(at)
        sound(tmp_path)
        for step in range(at + 1, before + 3):
            assert (checkpoint(folder, step) / "actor" / "weights.safetensors").read_text() == str(step)
        sound(tmp_path)
        kept = sorted(p.name for p in folder.checkpoints.iterdir())
        assert kept == ["latest", f"step_{before + 1:06d}", f"step_{before + 2:06d}"]
        close(folder)
        shutil.rmtree(tmp_path / "run")
        operation += 1
    assert steps == {before, before + 1} and operation > 10


def test_going_back_to_an_earlier_checkpoint_may_be_interrupted_at_any_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, operation, interrupted = set(), 0, True
    while interrupted:
        folder = open_folder(tmp_path, "runner.keep_checkpoints=0")
        for step in (1, 2, 3, 4):
            checkpoint(folder, step)
            folder.samples(step).parent.mkdir(exist_ok=True)
            folder.samples(step).write_text(str(step))
        with_steps(folder)
        close(folder)
        back = f"runner.resume_dir={folder.checkpoints / 'step_000002'}"
        interrupted = killed_at(monkeypatch, operation, lambda: close(open_folder(tmp_path, back, "runner.keep_checkpoints=0")))
        sound(tmp_path)
        # the lock is of a process that is gone
        folder.path.joinpath(".lock").unlink()
        folder = open_folder(tmp_path, "runner.resume_dir=auto", "runner.keep_checkpoints=0")
        assert folder.resume is not None
        steps.add(folder.resume.step)
        later = range(folder.resume.step + 1, 5)
        assert not any(folder.samples(step).exists() or (folder.checkpoints / f"step_{step:06d}").exists() for step in later)
        for step in (3, 4):  # nothing is lost before it is made again
            assert any(p.read_text() == str(step) for p in folder.checkpoints.glob(f"step_{step:06d}*/actor/weights.safetensors"))
            assert any(p.read_text() == str(step) for p in folder.samples(step).parent.glob(f"step_{step:06d}*"))
        for step in later:
            checkpoint(folder, step)
        assert not list(folder.checkpoints.glob("*.replaced-*"))
        close(folder)
        shutil.rmtree(tmp_path / "run")
        operation += 1
    assert steps == {2, 3, 4}


def test_a_branch_of_another_run_goes_on_from_its_start_until_it_has_a_checkpoint(tmp_path: Path) -> None:
    other = open_folder(tmp_path / "other")
    start = checkpoint(other, 7)
    branch = open_folder(tmp_path, f"runner.resume_dir={start}")
    assert branch.resume is not None and branch.resume.step == 7 and not branch.continues
    close(branch)
    branch = open_folder(tmp_path, "runner.resume_dir=auto")
    assert branch.resume is not None and branch.resume.step_dir == start
    checkpoint(branch, 8)
    close(branch)
    branch = open_folder(tmp_path, "runner.resume_dir=auto")
    assert branch.resume is not None and branch.resume.step_dir.parent == branch.checkpoints


@pytest.mark.parametrize("file", ["run_state.json", "actor/index.json", "actor/weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path, file: str, damage: str) -> None:
    folder = open_folder(tmp_path)
    path = checkpoint(folder, 1) / file
    close(folder)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + b"~")
    if damage == "changed" and path.suffix == ".safetensors":
        return  # seen by the tensor's own checksum, when it is read
    with pytest.raises(
        UserError, match="no run_state.json" if (file, damage) == ("run_state.json", "missing") else "restore it, or use an earlier"
    ) as error:
        open_folder(tmp_path, "runner.resume_dir=auto")
    assert str(path.name) in str(error.value)


def test_samples_of_a_run_that_died_in_its_first_step_are_not_mixed_with_those_of_the_next_life(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.samples(1).parent.mkdir()
    folder.samples(1).write_text("half a step")
    close(folder)
    assert not open_folder(tmp_path).continues and not folder.samples(1).exists()


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


@pytest.mark.parametrize(
    ("keep", "ahead", "kept"), [(2, 0, [1, 4, 6, 7]), (2, 1, [1, 3, 4, 6, 7]), (0, 0, []), (-1, 0, [1, 2, 3, 4, 5, 6, 7])]
)
def test_journals_of_the_last_steps_and_of_those_behind_a_checkpoint_stay(tmp_path: Path, keep: int, ahead: int, kept: list[int]) -> None:
    folder = open_folder(tmp_path, f"runner.keep_groups={keep}", f"algorithm.max_staleness={ahead}")
    (folder.path / "samples").mkdir()
    for step in range(1, 8):
        if keep:
            folder.groups(step).write_text("{}\n")
        folder.record_order(step, [f"{step}.b", f"{step}.a"], [f"{step}.a", f"{step}.b"])
        if step == 3:
            checkpoint(folder, 3)
    assert (
        sorted(int(p.stem[-6:]) for p in folder.path.glob("samples/groups_*"))
        == kept
        == sorted(int(p.stem[-6:]) for p in folder.path.glob("samples/order_*"))
    )
    assert all(json.loads(folder.order(step).read_text())["groups"] == [f"{step}.b", f"{step}.a"] for step in kept)
