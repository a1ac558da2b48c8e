"""A run's folder: nothing of somebody else's is touched, and a checkpoint is complete or absent."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlinf.config.load import load
from rlinf.data.sampler import PromptSampler
from rlinf.errors import UserError
from rlinf.evaluation.folder import hold
from rlinf.files import write_json
from rlinf.run_folder.checkpoints import inventory, read_checkpoint
from rlinf.run_folder.folder import RunFolder
from rlinf.run_folder.resuming import TRAIN_ONLY
from rlinf.run_paths import COMPLETE


def open_folder(tmp_path: Path, *words: str) -> RunFolder:
    words = (f"runner.output_dir={tmp_path}", "runner.experiment_name=run", "runner.keep_checkpoints=2", *words)
    return begun(RunFolder(load("smollm2-135m-grpo-cpu", [*words])))


def begun(folder: RunFolder) -> RunFolder:
    folder.begin()
    return folder


def close(folder: RunFolder) -> None:
    folder._lock.close()


def checkpoint(folder: RunFolder, step: int, **state: object) -> Path:
    partial = folder.checkpoints.begin(step)
    (partial / "actor").mkdir()
    (partial / "actor" / "weights.safetensors").write_text(str(step))
    (partial / "actor" / "index.json").write_text(json.dumps({"step": step}))
    return folder.finish_checkpoint(partial, {"step": step} | state)


def with_steps(folder: RunFolder) -> None:
    (folder.path / "metrics.jsonl").write_text('{"step": 0}\n')


def test_a_new_folder_holds_the_resolved_configuration(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    assert not folder.continues and folder.resume is None
    assert "experiment_name: run" in (folder.path / "config.yaml").read_text()


@pytest.mark.parametrize("lives", [0, 1])
def test_a_run_that_is_killed_as_it_begins_can_be_started_again_and_keeps_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    for _ in range(lives):
        close(open_folder(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
        open_folder(tmp_path, "rollout.seed=7")
    file = tmp_path / "run" / "config.yaml"
    assert file.exists() == bool(lives) and (not lives or "seed: 7" not in file.read_text())
    (tmp_path / "run" / ".lock").unlink()  # it is of a process that is gone
    assert "seed: 7" in (open_folder(tmp_path, "rollout.seed=7").path / "config.yaml").read_text()


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="thesis.tex but no run of rlinf"):
        open_folder(tmp_path)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_weights_on_their_way_to_the_engines_go_with_the_run_that_wrote_them(tmp_path: Path) -> None:
    """When the run ends, or when it goes on where it had no time for that; nothing else in there, and not those of a run that lives."""
    folder = open_folder(tmp_path)
    published, own = folder.path / "weights" / "d0-s1" / "v3", folder.path / "weights" / "drafts-self"

    def publish() -> None:
        for place in (published, own):
            place.mkdir(parents=True, exist_ok=True)
            (place / "00000.safetensors").write_text("a copy of the model")

    publish()
    with pytest.raises(UserError, match="another run is writing here now"):
        open_folder(tmp_path)
    assert (published / "00000.safetensors").exists()
    folder.release()
    assert not published.parent.exists() and (own / "00000.safetensors").exists()
    publish()
    with_steps(folder)
    with pytest.raises(UserError, match="there is a run here already"):
        open_folder(tmp_path)
    assert (published / "00000.safetensors").exists()
    folder = open_folder(tmp_path, "runner.resume_dir=auto")
    assert not published.parent.exists() and (own / "00000.safetensors").exists()


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_that_locks_no_files_is_named_with_its_remedy(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre mounted without flock, NFS without its lock service."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    for key, claim in (("runner.output_dir", open_folder), ("evaluation.output_dir", hold)):
        with pytest.raises(UserError, match=rf"^{tmp_path}.*cannot be locked \({os.strerror(number)}\).*-o flock .* another {key}$"):
            claim(tmp_path)


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
    folder.checkpoints.begin(4)  # interrupted
    with_steps(folder)
    close(folder)
    assert sorted(p.name for p in folder.paths.checkpoints.glob("step_??????")) == ["step_000002", "step_000003"]
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
        kept = sorted(p.name for p in folder.paths.checkpoints.iterdir())
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
            folder.paths.samples(step).parent.mkdir(exist_ok=True)
            folder.paths.samples(step).write_text(str(step))
        with_steps(folder)
        close(folder)
        back = f"runner.resume_dir={folder.paths.checkpoints / 'step_000002'}"
        interrupted = killed_at(monkeypatch, operation, lambda: close(open_folder(tmp_path, back, "runner.keep_checkpoints=0")))
        sound(tmp_path)
        # the lock is of a process that is gone
        folder.path.joinpath(".lock").unlink()
        folder = open_folder(tmp_path, "runner.resume_dir=auto", "runner.keep_checkpoints=0")
        assert folder.resume is not None
        steps.add(folder.resume.step)
        later = range(folder.resume.step + 1, 5)
        assert not any(folder.paths.samples(step).exists() or (folder.paths.checkpoints / f"step_{step:06d}").exists() for step in later)
        for step in (3, 4):  # nothing is lost before it is made again
            assert any(p.read_text() == str(step) for p in folder.paths.checkpoints.glob(f"step_{step:06d}*/actor/weights.safetensors"))
            assert any(p.read_text() == str(step) for p in folder.paths.samples(step).parent.glob(f"step_{step:06d}*"))
        for step in later:
            checkpoint(folder, step)
        assert not list(folder.paths.checkpoints.glob("*.replaced-*"))
        close(folder)
        shutil.rmtree(tmp_path / "run")
        operation += 1
    assert steps == {2, 3, 4}


def scored(folder: RunFolder, step: int, **metrics: float) -> Path:
    return checkpoint(folder, step, metrics=metrics)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    folder, found = open_folder(tmp_path, "runner.keep_checkpoints=2"), []
    for step, accuracy in enumerate([0.3, 0.8, None, 0.5, 0.8, 0.7, 0.6, 0.4], 1):
        scored(folder, step, **({} if accuracy is None else {"eval/accuracy": accuracy}))
        found.append((folder.paths.complete_checkpoints(), folder.paths.best.resolve().name))
    assert found[0] == ([1], "step_000001") and found[3] == ([2, 3, 4], "step_000002")
    assert found[4] == ([4, 5], "step_000005")  # the newest of equals
    assert found[7] == ([5, 7, 8], "step_000005") and folder.paths.latest.resolve().name == "step_000008"
    close(folder)
    back = open_folder(tmp_path, f"runner.resume_dir={folder.paths.checkpoints / 'step_000007'}", "runner.keep_checkpoints=1")
    scored(back, 8, **{"eval/accuracy": 0.9})
    assert back.paths.complete_checkpoints() == [8] and back.paths.best.resolve().name == "step_000008"
    close(back)


def test_only_scores_on_the_same_problems_are_compared(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, "runner.keep_checkpoints=0")
    folder.measured_on = "easy"
    for step in (1, 2):
        scored(folder, step, **{"eval/accuracy": 1 - step / 10})
    assert folder.paths.best.resolve().name == "step_000001"
    close(folder)
    harder = open_folder(tmp_path, "runner.resume_dir=auto", "runner.keep_checkpoints=0")
    harder.measured_on = "hard"
    assert harder.resume is not None and not harder.measures_as(harder.resume.state)
    for step, accuracy in ((3, 0.2), (4, 0.1)):
        scored(harder, step, **{"eval/accuracy": accuracy})
    scored(harder, 5)
    assert harder.paths.best.resolve().name == "step_000003"
    close(harder)
    back = open_folder(tmp_path, f"runner.resume_dir={harder.paths.checkpoint(2)}", "runner.keep_checkpoints=0")
    assert back.paths.best.resolve().name == "step_000001"  # what came after has been set aside
    close(back)
    without = open_folder(tmp_path, "runner.resume_dir=auto", "runner.keep_checkpoints=0", "runner.keep_best=false")
    assert not without.paths.best.is_symlink()
    close(without)


def test_the_best_checkpoint_of_an_earlier_life_and_of_fine_tuning(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for step, loss in ((1, 2.0), (2, 1.5), (3, float("nan")), (4, 1.7)):
        scored(folder, step, **{"sft/val_loss": loss})
    assert folder.paths.complete_checkpoints() == [2, 3, 4]
    close(folder)
    again = open_folder(tmp_path, "runner.resume_dir=auto")  # knows the scores from the checkpoints
    scored(again, 5, **{"sft/val_loss": 1.6})
    assert again.paths.complete_checkpoints() == [2, 4, 5] and again.paths.best.resolve().name == "step_000002"
    (again.paths.checkpoint(2) / "run_state.json").write_text("{")  # whoever resumes from it is told; the run goes on
    close(again)
    last = open_folder(tmp_path, "runner.resume_dir=auto", "runner.keep_best=false")
    scored(last, 6)
    assert last.paths.complete_checkpoints() == [5, 6] and not last.paths.best.is_symlink()
    close(last)


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
    assert branch.resume is not None and branch.resume.step_dir.parent == branch.paths.checkpoints


def test_the_links_to_checkpoints_are_names_of_checkpoints(tmp_path: Path) -> None:
    other = open_folder(tmp_path / "other")
    start = checkpoint(other, 7)
    branch = open_folder(tmp_path, f"runner.resume_dir={start.parent / 'latest'}")
    assert branch.resume is not None and branch.resume.step_dir == start


def test_a_branch_whose_start_is_gone_does_not_begin_anew(tmp_path: Path) -> None:
    other = open_folder(tmp_path / "other")
    start = checkpoint(other, 7)
    close(open_folder(tmp_path, f"runner.resume_dir={start}"))
    shutil.rmtree(start)
    with pytest.raises(UserError, match="goes on from .*step_000007, which is gone; restore it"):
        open_folder(tmp_path, "runner.resume_dir=auto")


def test_a_branch_into_a_run_keeps_the_steps_that_it_does_not_make_again(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for step in (10, 60):
        checkpoint(folder, step)
    with_steps(folder)
    close(folder)
    branch = open_folder(tmp_path, f"runner.resume_dir={checkpoint(open_folder(tmp_path / 'other'), 50)}")
    checkpoint(branch, 70)
    kept = {p.name for p in branch.paths.checkpoints.iterdir()}
    assert kept == {"latest", "step_000070", "step_000010.replaced-1"}  # 60 was before 70 and is made again


@pytest.mark.parametrize(("made", "word"), [({"seed": 1234}, "data.seed=7"), ({"shuffle": True}, "data.shuffle=false")])
def test_another_order_of_the_data_is_refused_before_anything_is_touched(tmp_path: Path, made: dict[str, object], word: str) -> None:
    folder = open_folder(tmp_path)
    for step in (1, 2):
        checkpoint(folder, step, sampler=made)
    with_steps(folder)
    close(folder)
    before = {p.name for p in folder.paths.checkpoints.iterdir()}
    with pytest.raises(UserError, match=f"cannot resume: .*{word.partition('=')[0]}"):
        open_folder(tmp_path, f"runner.resume_dir={folder.paths.checkpoints / 'step_000001'}", word)
    assert {p.name for p in folder.paths.checkpoints.iterdir()} == before and folder.paths.latest.resolve().name == "step_000002"


def test_a_checkpoint_is_one_without_its_model_for_others(tmp_path: Path) -> None:
    """hf/ can be made again; and groups that were generated ahead have no checksums of their own."""
    folder = open_folder(tmp_path)
    partial = folder.checkpoints.begin(1)
    for name in ("hf", "waiting"):
        (partial / name).mkdir()
        (partial / name / "a.safetensors").write_bytes(bytes(100))
    step_dir = folder.finish_checkpoint(partial, {"step": 1})
    shutil.rmtree(step_dir / "hf")
    assert read_checkpoint(step_dir).step == 1
    (step_dir / "waiting" / "a.safetensors").write_bytes(bytes(99) + b"1")
    with pytest.raises(UserError, match="waiting/a.safetensors is damaged"):
        read_checkpoint(step_dir)


LOGICAL = {"begun": 2, "waiting": [{"scored": ["00-00000", "00-00001"]}]}
WALLCLOCK = {"ledger": {"begun": 24, "groups": [["3.a", 1, True], ["3.b", 1, False]]}, "wanted": []}
NOTHING = {"begun": 1, "waiting": []}
SIXTEEN = ("data.rollout_batch_size=16", "algorithm.group_size=8")


def resumed_with(tmp_path: Path, schedule: dict[str, object], before: tuple[str, ...], after: tuple[str, ...]) -> RunFolder:
    folder = open_folder(tmp_path, *SIXTEEN, *before)
    checkpoint(folder, 1, schedule=schedule, sampler={"epoch": 0})
    folder.paths.samples(2).parent.mkdir()
    folder.paths.samples(2).write_text("made after the checkpoint")
    close(folder)
    try:
        return open_folder(tmp_path, "runner.resume_dir=auto", *SIXTEEN, *before, *after)
    except UserError:
        assert folder.paths.samples(2).exists()  # nothing was set aside for it
        raise


AHEAD = ("algorithm.max_staleness=2",)
CLOCK = (*AHEAD, "algorithm.schedule=wallclock")


@pytest.mark.parametrize(("schedule", "before", "after", "says"), [
    (WALLCLOCK, CLOCK, "algorithm.max_staleness=1", "algorithm.max_staleness: 2 instead of 1"),
    (WALLCLOCK, CLOCK, "data.rollout_batch_size=32", "data.rollout_batch_size: 16 instead of 32"),
    (WALLCLOCK, CLOCK, "algorithm.schedule=logical", "algorithm.schedule: 'wallclock' instead of 'logical'"),
    (WALLCLOCK, CLOCK, "algorithm.group_size=4", "algorithm.group_size: 8 instead of 4"),
    (LOGICAL, AHEAD, "algorithm.schedule=wallclock", "algorithm.schedule: 'logical' instead of 'wallclock'"),
    (LOGICAL, AHEAD, "algorithm.max_staleness=0", "algorithm.max_staleness: 2 instead of 0"),
    (LOGICAL, AHEAD, "data.rollout_batch_size=8", "data.rollout_batch_size: 16 instead of 8"),
    (WALLCLOCK, CLOCK, "algorithm.sampling_params.temperature=0.5", "algorithm.sampling_params.temperature: 1.0 instead of 0.5"),
    (LOGICAL, AHEAD, "algorithm.sampling_params.stop=[END]", "algorithm.sampling_params.stop: ['\\n'] instead of ['END']"),
    (WALLCLOCK, CLOCK, "algorithm.sampling_params.max_new_tokens=8", "algorithm.sampling_params.max_new_tokens: 24 instead of 8"),
    (LOGICAL, AHEAD, "reward.reward_scale=1", "reward.reward_scale: 5.0 instead of 1.0"),
])  # fmt: skip
def test_settings_that_the_groups_generated_ahead_do_not_fit_are_refused_before_anything_is_touched(
    tmp_path: Path, schedule: dict[str, object], before: tuple[str, ...], after: str, says: str
) -> None:
    with pytest.raises(UserError, match="holds . groups that were generated ahead") as error:
        resumed_with(tmp_path, schedule, before, (after,))
    step_dir = tmp_path / "run" / "checkpoints" / "step_000001"
    assert says in str(error.value) and f"rollout.model_dir={step_dir / 'hf'}" in str(error.value)


@pytest.mark.parametrize(("schedule", "before", "after"), [
    (WALLCLOCK, CLOCK, ("algorithm.max_staleness=3",)),
    (LOGICAL, AHEAD, ("algorithm.max_staleness=3",)),
    (LOGICAL, AHEAD, ("runner.max_steps=50", "data.seed=7")),
    (WALLCLOCK, CLOCK, ("algorithm.sampling_params.max_new_tokens=25", "reward.timeout=3", "reward.num_processes=2")),
    (NOTHING, AHEAD, ("algorithm.sampling_params.temperature=0.5", "reward.reward_scale=1")),
    (NOTHING, (), ("data.rollout_batch_size=32", "algorithm.schedule=wallclock", "algorithm.max_staleness=1")),
    (NOTHING, AHEAD, ("algorithm.max_staleness=0", "algorithm.group_size=4")),
])  # fmt: skip
def test_other_settings_may_change(tmp_path: Path, schedule: dict[str, object], before: tuple[str, ...], after: tuple[str, ...]) -> None:
    resumed = resumed_with(tmp_path, schedule, before, after)
    assert resumed.resume is not None and resumed.resume.step == 1


@pytest.mark.parametrize("key", ["own_tasks", "own_parts", "own_group_parts"])
def test_a_function_of_the_users_own_may_move_but_not_change(tmp_path: Path, key: str) -> None:
    before, moved = tmp_path / "judge.py", tmp_path / "moved.py"
    for file in (before, moved):
        file.write_text("def same(): ...\n")
    settings = [(*AHEAD, f"reward.{key}={{ours: '{file}:same'}}") for file in (before, moved)]
    close(resumed_with(tmp_path, LOGICAL, settings[0], settings[1]))
    moved.write_text("def same(): return True\n")
    with pytest.raises(UserError, match=f"reward.{key}: {{'ours': 'same .*'}} instead of {{'ours': 'same "):
        open_folder(tmp_path, "runner.resume_dir=auto", *SIXTEEN, *settings[1])


def test_a_checkpoint_is_made_with_the_functions_that_the_run_began_with(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def same(): ...\n")
    words = (*AHEAD, f"reward.own_tasks={{ours: '{judge}:same'}}")
    folder = open_folder(tmp_path, *words)
    judge.write_text("def same(): return True\n")
    checkpoint(folder, 1, schedule=LOGICAL, sampler={"epoch": 0})
    close(folder)
    with pytest.raises(UserError, match="reward.own_tasks"):
        open_folder(tmp_path, "runner.resume_dir=auto", *words)


def without_settings(folder: RunFolder, step: int, **state: object) -> Path:
    """A checkpoint as they were before they told the settings."""
    partial = folder.checkpoints.begin(step)
    final = folder.finish_checkpoint(partial, {"step": step} | state)
    old = json.loads((final / "run_state.json").read_text())
    old.pop("made_with", None)
    (final / "run_state.json").write_text(json.dumps(old))
    (final / COMPLETE).unlink()
    write_json(final / COMPLETE, inventory(final))
    return final


def test_a_checkpoint_that_does_not_tell_its_settings_is_gone_on_from(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, *CLOCK)
    without_settings(folder, 1, schedule=WALLCLOCK, sampler={"epoch": 0})
    close(folder)
    assert close(open_folder(tmp_path, "runner.resume_dir=auto", *CLOCK, "data.rollout_batch_size=8")) is None
    with pytest.raises(UserError, match="algorithm.schedule: 'wallclock' instead of 'logical'"):
        open_folder(tmp_path, "runner.resume_dir=auto")


def test_training_alone_goes_on_from_any_training_but_not_the_other_way_round(tmp_path: Path) -> None:
    """Without a sampler there is no place in the data to go on from."""
    folder = open_folder(tmp_path)
    whole = checkpoint(folder, 1, schedule=LOGICAL, sampler={"epoch": 0})
    close(folder)
    words = [f"runner.output_dir={tmp_path}", "runner.experiment_name=half", f"runner.resume_dir={whole}", *CLOCK]
    half = begun(RunFolder(load("smollm2-135m-grpo-cpu", words), TRAIN_ONLY))
    made = [checkpoint(half, 2, sampler={}), without_settings(half, 3, command="train", sampler={})]
    close(half)
    for step_dir in reversed(made):
        with pytest.raises(UserError, match="is a checkpoint of `rlinf train --debug-train-only`, and this is `rlinf train`"):
            open_folder(tmp_path, f"runner.resume_dir={step_dir}")
        words[2] = f"runner.resume_dir={step_dir}"
        close(RunFolder(load("smollm2-135m-grpo-cpu", words), TRAIN_ONLY))


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
    folder.paths.samples(1).parent.mkdir()
    folder.paths.samples(1).write_text("half a step")
    close(folder)
    assert not open_folder(tmp_path).continues and not folder.paths.samples(1).exists()


def test_samples_of_repeated_steps_are_set_aside_not_lost_nor_mixed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    checkpoint(folder, 1)
    with_steps(folder)
    folder.paths.samples(1).parent.mkdir()
    for step in (1, 2):
        folder.paths.samples(step).write_text(f"old {step}")
    close(folder)
    open_folder(tmp_path, "runner.resume_dir=auto")
    assert folder.paths.samples(1).read_text() == "old 1" and not folder.paths.samples(2).exists()
    assert (folder.paths.samples(2).parent / "step_000002.jsonl.replaced-1").read_text() == "old 2"


def test_copies_that_somebody_made_of_checkpoints_and_samples_are_left_alone(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    checkpoint(folder, 1)
    with_steps(folder)
    folder.paths.samples(1).parent.mkdir()
    folder.paths.samples(2).write_text("old 2")
    names = ("step_000001.bak", "step_000002.bak.replaced-1", "step_best.replaced-1", "step_best")
    copies = [folder.paths.checkpoints / name for name in names]
    for copy in copies:
        shutil.copytree(folder.paths.checkpoints / "step_000001", copy)
    files = [folder.paths.samples(1).with_name(name) for name in ("step_000002_copy.jsonl", "order_000002_copy.jsonl", "my_notes.jsonl")]
    for file in files:
        file.write_text("mine")
    close(folder)
    folder = open_folder(tmp_path, "runner.resume_dir=auto", "runner.keep_groups=1")
    folder.record_order(2, ["2.a"], ["2.a"])
    checkpoint(folder, 2)
    assert all((copy / COMPLETE).exists() for copy in copies) and all(file.read_text() == "mine" for file in files)


def test_groups_that_a_checkpoint_holds_are_written_down_again(tmp_path: Path) -> None:
    """3.b was not done and is judged again, 2.a was done and comes from the checkpoint; the disk filled up when 3.b was written."""
    row = lambda name: json.dumps({"group_id": name, "x": "\u2028"}, ensure_ascii=False) + "\n"
    record = [(2, row("2.a") + row("2.x")), (3, row("3.x") + row("3.a") + row("3.b")[:9] + row("3.c") + row("3.y")), (4, row("4.a"))]
    again = {2: row("2.a"), 3: row("3.a") + row("3.b")[:9] + row("3.c")}
    wanted = [[name, 0, int(name[0])] for name in ("2.a", "3.a", "3.b", "3.c", "4.a", "5.a")]
    folder = open_folder(tmp_path, *CLOCK)
    (folder.path / "samples").mkdir()
    for step, text in record:
        folder.paths.samples(step).write_text(text)
        folder.paths.groups(step).write_text(text)
    checkpoint(folder, 3, schedule=WALLCLOCK | {"wanted": wanted}, sampler={"epoch": 0})
    close(folder)
    for _ in range(2):  # the second time there is nothing left to be moved
        close(open_folder(tmp_path, "runner.resume_dir=auto", *CLOCK))
        for files in (folder.paths.samples, folder.paths.groups):
            assert files(2).read_text() == row("2.x") and files(3).read_text() == row("3.x") + row("3.y") and not files(4).exists()
            assert {step: files(step).with_name(f"{files(step).name}.replaced-1").read_text() for step in again} == again
    assert len(list((folder.path / "samples").iterdir())) == 2 * 5


@pytest.mark.parametrize(
    ("keep", "ahead", "kept", "begun"), [
        (2, 0, [1, 4, 6, 7], [1, 4, 6, 7]), (2, 1, [1, 4, 6, 7], [1, 3, 4, 5, 6, 7]), (1, 2, [1, 4, 7], [1, 2, 4, 5, 6, 7]),
        (0, 0, [], []),
        (-1, 0, [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7])
    ],
)  # fmt: skip
def test_journals_of_the_last_steps_and_of_those_behind_a_checkpoint_stay(
    tmp_path: Path, keep: int, ahead: int, kept: list[int], begun: list[int]
) -> None:
    """A step may train on groups that were begun for one of the `ahead` steps before it; here it has one of its own and one of the first
    of these. Journals whose groups may still be trained on stay as well."""
    folder = open_folder(tmp_path, f"runner.keep_groups={keep}", f"algorithm.max_staleness={ahead}")
    (folder.path / "samples").mkdir()
    for step in range(1, 8):
        if keep:
            folder.paths.groups(step).write_text("{}\n")
        first = max(1, step - ahead)
        folder.record_order(step, [f"{step}.b", f"{first}.a"], [f"{first}.a", f"{step}.b"])
        if step == 3:
            checkpoint(folder, 3)
    assert sorted(int(p.stem[-6:]) for p in folder.path.glob("samples/groups_*")) == begun
    assert sorted(int(p.stem[-6:]) for p in folder.path.glob("samples/order_*")) == kept
    assert all(json.loads(folder.paths.order(step).read_text())["groups"] == [f"{step}.b", f"{max(1, step - ahead)}.a"] for step in kept)


def test_journals_stay_as_long_as_a_kept_step_has_groups_in_them_also_in_the_next_life(tmp_path: Path) -> None:
    """With the clock, names run ahead of the steps that train on them: step 1 has groups that were begun for 3 and 4."""
    words = ("runner.keep_groups=1", *CLOCK)
    folder = open_folder(tmp_path, *words)
    (folder.path / "samples").mkdir()
    for begun_for in range(1, 20):
        folder.paths.groups(begun_for).write_text("{}\n")
    folder.record_order(1, ["1.a", "3.a"], ["4.a", "1.a", "3.a"])
    for step in range(2, 9):
        folder.record_order(step, [f"{step + 3}.b"], [f"{step + 3}.b"])
    left = lambda: folder.paths.steps_of("groups")
    assert left() == [1, 3, 4, *range(7, 20)]
    checkpoint(folder, 8, schedule=NOTHING, sampler={"epoch": 0})
    with_steps(folder)
    close(folder)
    folder.paths.order(8).write_text("[1]\n")  # damaged: that step cannot be replayed, and the run goes on
    again = open_folder(tmp_path, "runner.resume_dir=auto", *words, "runner.keep_groups=2")
    for begun_for in range(9, 20):
        folder.paths.groups(begun_for).write_text("{}\n")
    for step in range(9, 12):
        again.record_order(step, [f"{step + 3}.b"], [f"{step + 3}.b"])
    assert left() == [1, 3, 4, *range(10, 20)] and again.paths.steps_of("order") == [1, 9, 10, 11]


def sampler(fingerprint: str = "ours") -> PromptSampler:
    return PromptSampler(16, 4, True, 7, fingerprint)


def at_step(folder: RunFolder, step: int) -> Path:
    taken = sampler()
    for _ in range(step):
        taken.next_batch()
    with_steps(folder)
    return checkpoint(folder, step, sampler=taken.state_dict())


def test_a_run_on_other_data_is_refused_with_everything_in_its_place(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    first, _ = at_step(folder, 1), at_step(folder, 2)
    folder.finish()
    close(folder)
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    words = (
        f"runner.output_dir={tmp_path}",
        "runner.experiment_name=run",
        f"runner.resume_dir={first}",
        "data.seed=7",
        "runner.max_steps=9",
    )
    again = RunFolder(load("smollm2-135m-grpo-cpu", [*words]))
    with pytest.raises(UserError, match="made with training data 'ours', this run has 'another'"):
        again.nothing_left(sampler("another"))
    close(again)
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("words", "finished", "nothing"), [((), True, True), (("runner.max_steps=3",), True, False), ((), False, False)])
def test_a_finished_run_has_nothing_left_unless_more_steps_are_asked_for(
    tmp_path: Path, words: tuple[str, ...], finished: bool, nothing: bool
) -> None:
    folder = open_folder(tmp_path, "runner.max_steps=2", "data.seed=7")
    assert not folder.nothing_left(sampler())
    at_step(folder, 2)
    if finished:
        folder.finish()
    close(folder)
    place = [f"runner.output_dir={tmp_path}", "runner.experiment_name=run", "runner.max_steps=2", "data.seed=7", "runner.resume_dir=auto"]
    again, stands = RunFolder(load("smollm2-135m-grpo-cpu", [*place, *words])), sampler()
    assert again.nothing_left(stands) == nothing and stands.handed_out == 8
