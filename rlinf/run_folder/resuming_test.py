"""A checkpoint of another model is refused before anything in the run's folder has changed."""

from pathlib import Path

import pytest

from rlinf.config.load import Resolved, load
from rlinf.errors import UserError
from rlinf.files import write_json
from rlinf.launch.session import open_session
from rlinf.run_folder.folder import RunFolder
from rlinf.run_folder.resuming import SFT, refuse_other_model
from rlinf.weights.checkpoint_part import KINDS, write_index
from rlinf.weights.tensor_folder import open_hf_folder, write_tensors
from tests.tiny import make_tiny_model


def resolve(tmp_path: Path, model: Path, *words: str) -> Resolved:
    run = (f"runner.output_dir={tmp_path}", "runner.experiment_name=run", f"rollout.model_dir={model}")
    return load("smollm2-135m-grpo-cpu", [*run, *words])


def finished_run(tmp_path: Path, model: Path, lora: dict | None = None) -> Path:
    folder = RunFolder(resolve(tmp_path, model))
    folder.begin()
    partial = folder.checkpoints.begin(2)
    actor = partial / "actor"
    write_index(actor, 0, {kind: write_tensors(actor, f"{kind}-s0", open_hf_folder(model).items()) for kind in KINDS})
    write_json(actor / "state.json", {"steps": 2, "lora": lora})
    step_dir = folder.finish_checkpoint(partial, {"step": 2, "sampler": {"seed": 1234}})
    (folder.path / "metrics.jsonl").write_text('{"step": 0}\n')
    folder.finish()
    folder.release()
    return step_dir


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": 2}, r"tensor model.layers.2.input_layernorm.weight is \(64,\) in it, and not there in rollout.model_dir"),
        ({"hidden": 32}, r"is \(320, 64\) in it, and \(320, 32\) in rollout.model_dir"),
        ({"family": "qwen3"}, r"k_norm.weight is not there in it, and \(24,\) in rollout.model_dir"),
    ],
)
def test_a_resumption_with_another_model_is_refused_and_has_changed_nothing(tmp_path: Path, other: dict, message: str) -> None:
    step_dir = finished_run(tmp_path, make_tiny_model(tmp_path / "model"))
    before = content(step_dir.parents[1])
    resolved = resolve(tmp_path, make_tiny_model(tmp_path / "other", **other), "runner.resume_dir=auto", "data.seed=1234")
    with pytest.raises(UserError, match=message) as error, open_session(resolved, RunFolder(resolved), None, ""):
        pass
    assert str(error.value).startswith(f"runner.resume_dir: {step_dir} ") and "in a new run" in str(error.value)
    assert content(step_dir.parents[1]) == before and "FINISHED" in before


def test_the_model_that_it_was_made_of_goes_on_and_a_critic_must_have_been_there(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    step_dir = finished_run(tmp_path, model)
    refuse_other_model(step_dir, "train", resolve(tmp_path, model).config)
    with_critic = resolve(tmp_path, model, "algorithm.adv_type=gae").config
    refuse_other_model(step_dir, SFT, with_critic)
    with pytest.raises(UserError, match=f"{step_dir} was made without a critic, .* rollout.model_dir={step_dir / 'hf'}"):
        refuse_other_model(step_dir, "train", with_critic)


def test_adapters_go_on_with_the_settings_they_were_trained_with(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    step_dir = finished_run(tmp_path, model, {"rank": 4, "alpha": 32.0, "target_modules": ["linear_qkv"]})
    before = content(step_dir.parents[1])
    for words in ((), ("actor.lora.rank=8", "actor.lora.target_modules=[linear_qkv]"), ("actor.lora.rank=4",)):
        resolved = resolve(tmp_path, model, "runner.resume_dir=auto", "data.seed=1234", *words)
        with (
            pytest.raises(UserError, match="was trained with actor.lora of rank 4") as error,
            open_session(resolved, RunFolder(resolved), None, ""),
        ):
            pass
        assert f"begin a new run from {step_dir / 'hf'}" in str(error.value) and content(step_dir.parents[1]) == before
