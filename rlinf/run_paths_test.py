"""What a run has written is found whatever its step, by every reader; what somebody made beside it never is."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf.errors import UserError
from rlinf.evaluation.models import model_of
from rlinf.report.replay import checkpoint_before
from rlinf.report.run_data import RunData, sample_files
from rlinf.run_paths import COMPLETE, PARTIAL, SAMPLE_KINDS, RunPaths, aside, journal_of, replaced, step_of
from rlinf.runners.recorded import RecordedSteps

STEPS = [2, 999_999, 1_000_000, 12_345_678]
COPIES = (
    "step_000001.bak",
    "step_000001_good",
    "step_000001 (copy)",
    "my_step_000001",
    "step_best",
    "step_1",
    "step_0000001",
    "step_00001x",
)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run with files and complete checkpoints of STEPS, and with copies of both."""
    paths = RunPaths(tmp_path)
    paths.samples_dir.mkdir()
    for step in STEPS:
        for kind in SAMPLE_KINDS:
            paths.sample_file(kind, step).touch()
    for folder in [paths.checkpoint(step) for step in STEPS] + [paths.checkpoints / name for name in COPIES]:
        (folder / "hf").mkdir(parents=True)
        (folder / "hf" / "config.json").write_text("{}")
        (folder / COMPLETE).touch()
    for kind in SAMPLE_KINDS:
        for name in COPIES:
            (paths.samples_dir / f"{name.replace('step', kind)}.jsonl").touch()
        (paths.samples_dir / f"{kind}_000001.jsonl.bak").touch()
    return paths


def test_steps_of_six_digits_and_more_are_found_in_their_order_and_copies_are_not(paths: RunPaths) -> None:
    assert all(paths.steps_of(kind) == STEPS for kind in SAMPLE_KINDS) and paths.complete_checkpoints() == STEPS
    assert [step_of(paths.checkpoint(step)) for step in STEPS] == STEPS and not any(step_of(Path(name)) for name in COPIES)
    assert RunPaths(paths.run_dir / "none").steps_of("step") == RunPaths(paths.run_dir / "none").complete_checkpoints() == []


def test_every_reader_finds_the_steps_of_a_long_run(paths: RunPaths) -> None:
    assert RecordedSteps(paths.run_dir).steps == STEPS
    assert [(file.step, file.validation) for file in sample_files(paths)] == [(step, v) for step in STEPS for v in (False, True)]
    assert [*RunData(paths.run_dir, []).checkpoint_weights()] == STEPS
    assert checkpoint_before(paths.run_dir, 1_000_001) == paths.checkpoint(1_000_000)
    with pytest.raises(UserError, match=r"Steps that can be replayed: 1000000;"):
        checkpoint_before(paths.run_dir, 7)
    model = model_of(str(paths.checkpoint(12_345_678)))
    assert (model.series, model.step) == (paths.run_dir.name, 12_345_678) and model_of(str(paths.checkpoints / COPIES[0])).step == 0


def test_checkpoints_that_are_not_complete_are_told_from_those_that_are(paths: RunPaths) -> None:
    (paths.checkpoint(999_999) / COMPLETE).unlink()
    partial = paths.partial_checkpoint(1_000_001)
    partial.mkdir()
    (paths.checkpoints / f"step_000003.bak{PARTIAL}").mkdir()
    paths.checkpoint(2).rename(aside(paths.checkpoint(2)))
    assert paths.complete_checkpoints() == STEPS[2:]
    assert paths.unfinished_checkpoints() == [(999_999, paths.checkpoint(999_999)), (1_000_001, partial)]
    assert paths.replaced_checkpoints() == [(2, paths.checkpoints / "step_000002.replaced-1")]


def test_what_goes_aside_has_a_name_of_its_own_and_is_found_again(paths: RunPaths) -> None:
    file = paths.groups(2)
    names = []
    for _ in range(11):
        names.append(aside(file))
        names[-1].touch()
    file.with_name(f"{file.name}.replaced-old").touch()
    assert names[0].name == "groups_000002.jsonl.replaced-1" and replaced(file) == names[::-1] and replaced(paths.groups(999_999)) == []
    assert RecordedSteps(paths.run_dir).files("2.a") == [str(file), *map(str, names[::-1])]


def test_only_steps_are_journalled() -> None:
    assert journal_of(Path("a/samples/step_000012.jsonl")) == Path("a/samples/groups_000012.jsonl")
    assert journal_of(Path("a/samples/validation_000012.jsonl")) is None
