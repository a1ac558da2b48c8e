"""`rlinf train`, `rlinf plan` and `rlinf doctor` ask the same of a configuration's models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlinf.checks import doctor, preflight
from rlinf.checks.finding import FAIL
from rlinf.checks.preflight import check_engine, check_files, check_models, describe_sft_step, describe_step
from rlinf.cli import main
from rlinf.config.load import load
from rlinf.errors import UserError

NAME = "smollm2-135m-grpo-cpu"
SHAPE = {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "hidden_size": 64,
         "intermediate_size": 128, "vocab_size": 320}  # fmt: skip


def model(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    for name, text in {"config.json": json.dumps(SHAPE | changes), "model.safetensors": "", "tokenizer.json": "{}"}.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("role", "words"),
    [("critic", ["algorithm.adv_type=gae"]), ("token_reward", ["algorithm.adv_type=grpo"])],
    ids=["critic", "token_reward"],
)
def test_every_command_refuses_a_scoring_model_that_reads_other_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, words: list[str]
) -> None:
    models = [f"rollout.model_dir={model(tmp_path / 'actor')}", f"{role}.model_dir={model(tmp_path / 'other', vocab_size=99)}"]
    placed = f"cluster.component_placement={{'actor,{role},rollout,reward': all}}"
    words = [NAME, *models, *words, placed, "data.val_data_paths=[]"]
    expected = "its vocab_size is 99, the actor's 320"
    for command in (["train", *words, "--dry-run"], ["plan", *words]):
        assert main(command) == 2 and expected in capsys.readouterr().err, command
    found = [f for f in doctor.files(load(NAME, words[1:]).config) if f.check == "model"]
    assert [f.status for f in found] == [FAIL] and expected in found[0].text


def test_a_teacher_has_to_read_the_tokens_of_the_policy(tmp_path: Path) -> None:
    """It may know more of them, and have more rows that no token uses."""

    def written(name: str, tokens: list[str], rows: int) -> Path:
        backend = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": tokens[0]}}
        folder = model(tmp_path / name, vocab_size=rows, eos_token_id=0)
        (folder / "tokenizer.json").write_text(json.dumps(backend))
        return folder

    policy, larger, other, fewer = (
        written("policy", ["a", "b"], 320), written("larger", ["a", "b", "c"], 384), written("other", ["a", "c", "b"], 320),
        written("fewer", ["a", "b"], 319),
    )  # fmt: skip
    placed = "cluster.component_placement={'actor,token_reward,rollout,reward': all}"
    words = [f"rollout.model_dir={policy}", placed, "token_reward.output=teacher"]
    check_models(load(NAME, [*words, f"token_reward.model_dir={larger}"]).config, planned=False)
    for folder, expected in ((other, "which has the token 'b' as 1; a teacher reads"), (fewer, "its vocab_size is 319, the actor's 320")):
        with pytest.raises(UserError, match=expected):
            check_models(load(NAME, [*words, f"token_reward.model_dir={folder}"]).config, planned=False)


def test_what_is_elsewhere_is_a_warning_to_a_plan_and_ends_a_run(tmp_path: Path) -> None:
    words = ["rollout.model_dir=/nowhere/other", "data.train_data_paths=[/nowhere/a.jsonl]", "data.val_data_paths=[]"]
    config = load(NAME, words).config
    shape, warnings = check_models(config, planned=True)
    assert shape is None and "parallel sizes are not checked" in warnings[0]
    assert check_files(config, planned=True) == ["data.train_data_paths: /nowhere/a.jsonl is not on this machine"]
    with pytest.raises(UserError, match="rollout.model_dir: /nowhere/other does not exist"):
        check_models(config, planned=False)
    with pytest.raises(UserError, match="files that the run needs are not there:\n  data.train_data_paths: /nowhere/a.jsonl"):
        check_files(config, planned=False)


def test_a_run_on_one_machine_needs_its_engine_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path))  # where SGLang on CPU would be
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["rollout.rollout_backend=sglang", "cluster.device=cpu"]
    with pytest.raises(UserError, match="sglang is not installed for .*; run toolkits/setup/sglang_cpu.sh"):
        check_engine(load(NAME, words).config, planned=False)
    assert "sglang is not installed" in check_engine(load(NAME, words).config, planned=True)[0]
    with pytest.raises(UserError, match="rollout.sglang_python: /nowhere/python is not an executable file"):
        check_engine(load(NAME, [*words, "rollout.sglang_python=/nowhere/python"]).config, planned=False)
    assert check_engine(load(NAME, [*words, f"rollout.sglang_python={sys.executable}"]).config, planned=False) == []
    assert check_engine(load(NAME, [*words, "cluster.num_nodes=2"]).config, planned=False) == []
    assert check_engine(load(NAME).config, planned=False) == []
    for device, gpu, remedy in (("auto", True, "requirements/gpu.txt"), ("auto", False, "sglang_cpu.sh"), ("cpu", True, "sglang_cpu.sh")):
        monkeypatch.setattr(preflight, "has_gpu", lambda gpu=gpu: gpu)
        with pytest.raises(UserError, match=remedy):
            check_engine(load(NAME, [words[0], f"cluster.device={device}"]).config, planned=False)


def test_the_sizes_of_a_step() -> None:
    config = load(NAME, ["data.rollout_batch_size=8", "algorithm.group_size=16", "algorithm.n_minibatches=2", "sft.batch_size=3"]).config
    assert describe_step(config) == "step: 8 prompts x 16 responses = 128 samples, 2 optimizer step(s) of 64"
    config.algorithm.update_epochs = 3
    assert describe_step(config).endswith("128 samples, 3 passes of 2 optimizer step(s) of 64")
    config.algorithm.update_epochs = 1
    config.algorithm.num_update_sample_per_prompt = 4
    assert describe_step(config).endswith("128 samples, 4 of each prompt are trained on, 2 optimizer step(s) of 16")
    assert describe_sft_step(config) == "step: 3 examples, 1 optimizer step"
