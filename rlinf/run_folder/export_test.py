"""rlinf export: any checkpoint becomes a folder that transformers opens, or nothing does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlinf.checks.tiny_model import FAMILIES
from rlinf.cli import main
from rlinf.config.schema import LoraConfig
from rlinf.errors import UserError
from rlinf.files import write_json
from rlinf.run_folder.checkpoints import inventory
from rlinf.run_folder.export import export, export_adapters
from rlinf.run_paths import COMPLETE, STATE
from rlinf.training import checkpoint
from tests.training_ranks import build, minibatches, update

ROOT = Path(__file__).resolve().parents[2]


def train_and_save(at: Any, model: Path, step_dir: Path, precision: str, lora: LoraConfig = LoraConfig()) -> None:
    engine = build(at, model, precision=precision, lora=lora)
    for mini in minibatches(engine):
        update(engine, mini)
    checkpoint.save(engine, step_dir, model)


@pytest.fixture(scope="module")
def step_dirs(rank_pool: Any, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family: a complete checkpoint of bf16 training in two pipeline stages, in the folder of a run."""
    made = {}
    for family, model in tiny_models.items():
        (model / "tokenizer_config.json").write_text('{"marker": 1}\n')
        run = tmp_path_factory.mktemp("runs") / family
        step_dir = made[family] = run / "checkpoints" / "step_000001"
        rank_pool.run(train_and_save, model, step_dir, "bf16", ranks=2, pp=2)
        (run / "config.yaml").write_text(f"rollout:\n  model_dir: {model}\n")
        complete(step_dir)
    return made


@pytest.fixture(scope="module")
def adapted(rank_pool: Any, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint of adapters trained beside a bf16 model, in the folder of a run."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    step_dir = run / "checkpoints" / "step_000001"
    rank_pool.run(train_and_save, tiny_models["qwen2"], step_dir, "bf16", LoraConfig(rank=4, alpha=8.0), ranks=2, tp=2)
    (run / "config.yaml").write_text(f"rollout:\n  model_dir: {tiny_models['qwen2']}\n")
    complete(step_dir)
    return step_dir


def complete(step_dir: Path) -> None:
    (step_dir / COMPLETE).unlink(missing_ok=True)
    write_json(step_dir / STATE, {"step": 1})
    write_json(step_dir / COMPLETE, inventory(step_dir))


def weights(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_opens_in_transformers_and_holds_the_masters(step_dirs: dict[str, Path], tmp_path: Path, family: str) -> None:
    report = export(step_dirs[family], tmp_path / "fp32", "fp32", None)
    exact, rounded = weights(tmp_path / "fp32", torch.float32), weights(step_dirs[family] / "hf", torch.bfloat16)
    assert report["dtype"] == "float32" and json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"
    assert exact.keys() == rounded.keys() and all(torch.equal(exact[n].bfloat16(), rounded[n]) for n in exact)
    assert any(not torch.equal(exact[n], rounded[n].float()) for n in exact)  # more than hf/ holds
    assert json.loads((tmp_path / "fp32" / "tokenizer_config.json").read_text()) == {"marker": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["fp32"]


def test_without_hf_the_run_says_which_model_it_began_with(step_dirs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(step_dirs["llama"].parents[1], run)
    step_dir = run / "checkpoints" / "step_000001"
    shutil.rmtree(step_dir / "hf")
    export(step_dir / "actor", tmp_path / "out", "bf16", None)  # actor/ is what users of RLinf name
    made, kept = weights(tmp_path / "out", torch.bfloat16), weights(step_dirs["llama"] / "hf", torch.bfloat16)
    assert all(torch.equal(made[n], kept[n]) for n in kept)
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="--model-dir"):
        export(step_dir, tmp_path / "again", None, None)
    assert export(step_dir, tmp_path / "again", None, step_dirs["llama"] / "hf")["dtype"] == "bfloat16"


@pytest.mark.parametrize("other", ["qwen3", "qwen2"])
def test_the_configuration_of_another_model_is_refused(step_dirs: dict[str, Path], tmp_path: Path, other: str) -> None:
    with pytest.raises(UserError, match=r"tensor .*--model-dir"):
        export(step_dirs["llama"], tmp_path / "out", None, step_dirs[other] / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_gives_no_model(step_dirs: dict[str, Path], tmp_path: Path) -> None:
    step_dir = tmp_path / "step_000001"
    shutil.copytree(step_dirs["llama"], step_dir)
    file = step_dir / "actor" / "param-s1-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="param-s1-00001.safetensors: tensor .* is damaged"):
        export(step_dir, tmp_path / "out", None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"dtype": "int8"}, 'config.json: dtype is "int8", none of float32, bfloat16, float16; .* with --dtype'),
        ({"dtype": None, "torch_dtype": "Tensor"}, 'config.json: torch_dtype is "Tensor", none of'),
        ({"dtype": {"text": "float32"}}, 'config.json: dtype is {"text": "float32"}, none of'),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ("[]", "config.json: holds no JSON object"),
        ("{", "config.json:1: not valid JSON"),
        (None, "no config.json, so no model folder"),
    ],
)
def test_a_configuration_of_the_model_that_cannot_be_used_is_named(
    step_dirs: dict[str, Path], tmp_path: Path, content: dict | str | None, said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(step_dirs["llama"] / "hf", model)
    file = model / "config.json"
    text = json.dumps(json.loads(file.read_text()) | content) if isinstance(content, dict) else content
    file.write_text(text) if text is not None else file.unlink()
    with pytest.raises(UserError, match=f"^{model}.*{said}"):
        export(step_dirs["llama"], tmp_path / "out", None, model)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_export_that_is_interrupted_leaves_nothing_and_can_be_made_again(
    step_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr("rlinf.run_folder.export.open_hf_folder", interrupt)
        export(step_dirs["llama"], tmp_path / "out", None, None)
    assert list(tmp_path.iterdir()) == []
    export(step_dirs["llama"], tmp_path / "out", None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", ["", "rollout: 3\n", "rollout: {model_dir: 5}\n"])
def test_a_changed_configuration_of_the_run_asks_for_the_model(step_dirs: dict[str, Path], tmp_path: Path, content: str) -> None:
    step_dir = tmp_path / "checkpoints" / "step_000001"
    shutil.copytree(step_dirs["llama"], step_dir)
    shutil.rmtree(step_dir / "hf", ignore_errors=True)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="name its folder with --model-dir"):
        export(step_dir, tmp_path / "out", None, None)


def test_the_command_and_its_other_name(step_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_dir = str(step_dirs["qwen2-tied"])
    assert main(["export", step_dir, str(tmp_path / "out"), "--dtype", "fp16"]) == 0
    assert f"model: {tmp_path / 'out'}" in capsys.readouterr().out
    assert main(["export", step_dir, str(tmp_path / "out")]) == 2
    assert "exists; nothing was written" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "new")]) == 2
    script = ROOT / "toolkits" / "ckpt_convertor" / "mg2hf_7b.sh"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["bash", str(script), f"{step_dir}/actor", str(tmp_path / "by-script"), str(step_dirs["qwen2-tied"] / "hf"), "--dtype", "fp16"]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    first, second = (p / "model.safetensors" for p in (tmp_path / "out", tmp_path / "by-script"))
    assert first.read_bytes() == second.read_bytes()


def test_adapters_are_added_to_the_weights_the_run_began_with(adapted: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export(adapted, tmp_path / "whole", "fp32", None)
    exact, rounded = weights(tmp_path / "whole", torch.float32), weights(adapted / "hf", torch.bfloat16)
    start = weights(tiny_models["qwen2"], torch.float32)
    report = export_adapters(adapted / "actor", tmp_path / "adapters", None)
    adapters = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert report["tensors"] == len(adapters) == 2 * 7 * 4 and all(t.dtype == torch.float32 for t in adapters.values())
    changed = 0
    for name, found in exact.items():
        assert (found.float() - rounded[name].float()).abs().max() <= 2**-7 * found.abs().max()
        key = f"base_model.model.{name.removesuffix('weight')}"
        if f"{key}lora_A.weight" in adapters:
            added = 2.0 * (adapters[f"{key}lora_B.weight"] @ adapters[f"{key}lora_A.weight"])
            torch.testing.assert_close(found, start[name] + added, rtol=0, atol=1e-6)
            changed += bool(added.any())
        else:
            assert torch.equal(found, start[name])
    assert changed == 7 * 4
    about = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert about["peft_type"] == "LORA" and (about["r"], about["lora_alpha"]) == (4, 8.0)
    assert about["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert about["base_model_name_or_path"] == str(tiny_models["qwen2"])


def test_adapters_are_added_to_no_other_weights(adapted: Path, step_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"actor: its adapters were trained beside other weights than those of .*/hf: tensor model\."):
        export(adapted, tmp_path / "out", None, step_dirs["qwen2"] / "hf")
    run = tmp_path / "run"
    shutil.copytree(adapted.parents[1], run)
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="holds adapters, which are added to a model, and the model .* name its folder with --model-dir"):
        export(run / "checkpoints" / "step_000001", tmp_path / "out", None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_without_adapters_has_none_to_export(step_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all weights were trained \(actor.lora.rank 0\), so there are no adapters; leave --adapters out"):
        export_adapters(step_dirs["llama"], tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []
