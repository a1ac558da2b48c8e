"""Real runs of a tiny tuned model that go wrong for a planted reason: the report's rules name it, and nothing in a run that goes well."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlinf.config.load import load
from rlinf.launch.train import train
from rlinf.report.page import write_report
from rlinf.report.rules import Finding, find_problems
from rlinf.report.run_data import RunData, count_all, open_run
from rlinf.rollout.embedded_engine import EmbeddedEngine
from rlinf.weights.source import Receipt, SharedMemory
from tests.planted import write_data, write_tuned_model

STEPS = 16
JUDGES = '''"""Two judges that do not do what they should."""


def never(answer, solutions):
    return False


def fails(answer, solutions):
    raise KeyError("the table of answers")
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tuned_model(tmp_path_factory.mktemp("planted") / "model")


def run_of(folder: Path, model: Path, data: Path, **overrides: object) -> RunData:
    """A whole run in this process, read as the report reads it. Every step takes all sixteen prompts: curves are of one set."""
    config = {
        "cluster": {"backend": "local", "num_gpus_per_node": 1, "device": "cpu", "threads_per_worker": 1,
                    "component_placement": {"actor,rollout,reward": "0"}},
        "runner": {"output_dir": str(folder), "experiment_name": "run", "max_steps": STEPS, "max_epochs": STEPS, "seq_length": 48,
                   "max_tokens_per_mbs": 2048,
                   "val_check_interval": 0, "save_interval": 0, "keep_groups": 0, "logger": {"logger_backends": []}},
        "data": {"train_data_paths": [str(data)], "max_prompt_length": 32, "rollout_batch_size": 16, "apply_chat_template": True},
        "algorithm": {"group_size": 8, "sampling_params": {"max_new_tokens": 12}},
        "rollout": {"model_dir": str(model), "rollout_backend": "embedded", "verify_weights_every": 0},
        "actor": {"model": {"precision": "fp32"}, "optim": {"lr": 6e-3}},
    }  # fmt: skip
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        config.setdefault(section, {})[name] = value
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    assert train(load(str(file))) == 0
    run = open_run(folder / "run")
    for _ in count_all(run):
        pass
    return run


def only_finding(run: RunData) -> Finding:
    (finding,) = find_problems(run)
    return finding


def test_a_run_that_goes_well_has_no_finding(tmp_path: Path, model: Path) -> None:
    run = run_of(tmp_path, model, write_data(tmp_path / "data.jsonl", ("math", "exact")))
    _, accuracy = run.series("rollout/accuracy")
    assert accuracy[0] < 0.5 and accuracy[-1] > 0.8
    assert find_problems(run) == []


def test_an_entropy_bonus_of_the_wrong_sign(tmp_path: Path, model: Path) -> None:
    """What the model holds likely is wrong, and the objective makes it certain of that. (`rlinf train` refuses the value.)"""
    run = run_of(tmp_path, model, write_data(tmp_path / "data.jsonl", shift=1), algorithm__entropy_bonus=-2.0)
    found = only_finding(run)
    assert found.rule == "entropy-collapse" and "algorithm.entropy_bonus" in found.keys
    assert "entropy fell by" in found.evidence[0] and "prompts got the same response" in found.evidence[2]
    assert found.title in write_report(run.path).read_text()


def test_a_learning_rate_that_is_far_too_high(tmp_path: Path, model: Path) -> None:
    found = only_finding(run_of(tmp_path, model, write_data(tmp_path / "data.jsonl"), actor__optim={"lr": 0.05}, runner__max_steps=8))
    assert found.rule == "lost-format" and "actor.optim.lr" in found.keys and found.steps[0] <= 3


def test_judges_that_are_broken_for_two_of_three_tasks(tmp_path: Path, model: Path) -> None:
    judges = tmp_path / "judges.py"
    judges.write_text(JUDGES)
    data = write_data(tmp_path / "data.jsonl", ("math", "counting", "spelling"))
    found = only_finding(run_of(tmp_path, model, data, reward__own_tasks={"counting": f"{judges}:never", "spelling": f"{judges}:fails"}))
    assert found.rule == "broken-verifier" and "“counting”" in found.title and "“spelling”" in found.title and "math" not in found.title
    assert any(
        line.startswith("counting: ") and "written exactly like the solution were not graded right" in line for line in found.evidence
    )
    assert any(line.startswith("spelling: ") and "verdicts were undecided" in line for line in found.evidence)


def test_a_chat_template_that_is_left_out(tmp_path: Path, model: Path) -> None:
    data = write_data(tmp_path / "data.jsonl")
    found = only_finding(run_of(tmp_path, model, data, data__apply_chat_template=False, runner__max_steps=4))
    assert found.rule == "wrong-template" and "lack the model's chat template" in found.title and "data.apply_chat_template" in found.keys
    assert "<|assistant|>" in found.evidence[1] and "none of it" in found.evidence[1]


def test_weights_that_do_not_arrive(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = EmbeddedEngine._load

    def keep(self: EmbeddedEngine, source: SharedMemory, version: int) -> Receipt:
        """From version 2 on the engine takes the number alone."""
        if version < 2:
            return take(self, source, version)
        self._batcher.version = version
        sent = source.buckets
        return Receipt(version, {b.key: b.checksum for b in sent}, sum(len(b.tensors) for b in sent), sum(b.nbytes for b in sent), 0.0)

    monkeypatch.setattr(EmbeddedEngine, "_load", keep)
    found = only_finding(run_of(tmp_path, model, write_data(tmp_path / "data.jsonl")))
    assert found.rule == "stale-weights" and any("took the version's number" in line for line in found.evidence)
