"""Every mistake in an evaluation is one message that names the key, the file or the folder, and what to do; nothing is overwritten."""

from __future__ import annotations

import fcntl
import json
import signal
from pathlib import Path

import pytest

from rlinf.cli import main
from rlinf.errors import UserError
from rlinf.evaluation.results import read_tally
from tests.test_eval import words, write_problems
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen2-tied")


@pytest.fixture(autouse=True)
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["eval", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rlinf: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n": 0}, ["evaluation.custom.n = 0 (command line)", "at least 1"]),
        ({"temperature": 0}, ["evaluation.custom.n = 4", "greedy answers", "set n to 1"]),
        ({"top_p": 1.5}, ["evaluation.custom.top_p = 1.5", "at most 1"]),
        ({"template": "chatml"}, ["evaluation.custom.template", "chatml is not one of chat, r1, raw"]),
        ({"template": "r1"}, ["evaluation.custom.template is r1", "are not tokens of this model"]),
        ({"max_tokens": 5000}, ["evaluation.custom.max_tokens = 5000", "max_position_embeddings 4096", "lower it to at most"]),
        ({"path": "/nowhere.jsonl"}, ["/nowhere.jsonl: no such data file"]),
        ({"stop": '[""]'}, ["evaluation.custom.stop", "end every response at once"]),
        ({"max_new_tokens": 8}, ["evaluation.custom.max_new_tokens is not a key here", "it is called max_tokens"]),
        ({"pth": "x"}, ["unknown key evaluation.custom.pth", "did you mean evaluation.custom.path?"]),
    ],
)
def test_a_wrong_setting(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, change: dict, expected: list[str]) -> None:
    write_problems(tmp_path / "set.jsonl")
    err = refused(capsys, *words(tmp_path, model, **change))
    assert all(text in err for text in expected), err
    assert not (tmp_path / "out").exists()


def test_no_problems_no_model_no_template(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    assert "evaluation.aime24.path, evaluation.aime25.path" in refused(capsys, str(model))
    assert "rollout.model_dir is not set" in refused(capsys, "evaluation.custom.path=x")
    assert "no such configuration" in refused(capsys, "nothing-like-this")
    assert "is the configuration already" in refused(capsys, "grpo-7b-megatron", "grpo-1.5b-megatron")
    (tmp_path / "empty").mkdir()
    write_problems(tmp_path / "set.jsonl")
    assert "no config.json, so no model" in refused(capsys, *words(tmp_path, tmp_path / "empty"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        text = file.read_bytes()
        (bare / file.name).write_bytes(text)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    assert "has no chat template; set it to raw" in refused(capsys, *words(tmp_path, bare, template="chat"))


def test_models_that_would_share_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl")
    assert "is given twice" in refused(capsys, *words(tmp_path, model, model))
    other = tmp_path / model.name
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert "would both be named tiny" in refused(capsys, *words(tmp_path, model, other))


def test_sets_that_would_share_a_folder_and_tasks_without_a_judge(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "aime24.jsonl")
    path = tmp_path / "aime24.jsonl"
    err = refused(capsys, *words(tmp_path, model, path=path), f"evaluation.aime24.path={path}", "evaluation.aime24.max_tokens=8")
    assert "would be named aime24" in err and "rename the file" in err
    write_problems(tmp_path / "set.jsonl", task="poetry")
    assert "task 'poetry': no verifier" in refused(capsys, *words(tmp_path, model))


def test_a_foreign_folder_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl")
    place = tmp_path / "out" / "tiny" / "set"
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("x")
    assert "holds thesis.tex but no evaluation; set evaluation.output_dir" in refused(capsys, *words(tmp_path, model))
    assert [p.name for p in place.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    assert "evaluation.output_dir: cannot create" in refused(capsys, *words(tmp_path, model), f"evaluation.output_dir={tmp_path / 'file'}")


def test_samples_of_another_evaluation_are_never_mixed_in(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl", 2)
    assert main(["eval", *words(tmp_path, model, n=2)]) == 0
    capsys.readouterr()
    before = (tmp_path / "out" / "tiny" / "set" / "samples.jsonl").read_bytes()
    for change, name in (
        (words(tmp_path, model, n=3), "protocol was"),
        (words(tmp_path, model, n=2, temperature=0.5), "protocol was"),
        ([*words(tmp_path, model, n=2), "rollout.seed=3"], "engine was"),
        ([*words(tmp_path, model, n=2), "reward.answer_format=boxed_or_final_number"], "judge was"),
    ):
        err = refused(capsys, *change)
        assert "of another evaluation" in err and name in err and "nothing was overwritten" in err
    write_problems(tmp_path / "set.jsonl", 3)
    assert "problems was" in refused(capsys, *words(tmp_path, model, n=2))
    write_problems(tmp_path / "set.jsonl", 2)
    weights = model / "config.json"
    text = weights.read_text()
    weights.write_text(text + " ")
    assert "weights was" in refused(capsys, *words(tmp_path, model, n=2))
    weights.write_text(text)
    assert (tmp_path / "out" / "tiny" / "set" / "samples.jsonl").read_bytes() == before


def test_a_dump_changed_by_hand_is_noticed(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl", 2)
    assert main(["eval", *words(tmp_path, model, n=2)]) == 0
    file = tmp_path / "out" / "tiny" / "set" / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="1 of 4 samples are missing"):
        read_tally(file, ["p0", "p1"], 2)
    file.write_text("".join([*lines, lines[0]]))
    with pytest.raises(UserError, match="sample 0 of problem p0 does not belong there"):
        read_tally(file, ["p0", "p1"], 2)


def test_two_evaluations_cannot_share_a_model_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    write_problems(tmp_path / "set.jsonl")
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    with open(tmp_path / "out" / "tiny" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another evaluation is writing here now" in refused(capsys, *words(tmp_path, model))
