"""Whole fine-tuning runs of a tiny random model: local and under Ray, resumed bit for bit, and out as a Hugging Face folder."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlinf.cli import main
from rlinf.metrics.names import undocumented
from tests import tiny_run
from tests.tiny import make_tiny_model

STEPS = 5
LOCAL = {"cluster__backend": "local", "cluster__num_gpus_per_node": 1, "actor__model__tensor_model_parallel_size": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "qwen2-tied")


def write_run(folder: Path, model: Path, name: str = "tiny", **overrides: Any) -> Path:
    """A complete configuration of a small run in `folder`. 11 examples in batches of 4: batches cross epochs."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {i}+{i}? ", "response": f"It is {2 * i}."}) + "\n" for i in range(11)))
    config: dict[str, Any] = {
        "cluster": {"num_gpus_per_node": 2, "device": "cpu", "threads_per_worker": 1, "component_placement": {"actor": "all"}},
        "runner": {"output_dir": str(folder / "logs"), "experiment_name": name, "max_steps": STEPS, "max_epochs": 9, "seq_length": 64,
                   "max_tokens_per_mbs": 64, "val_check_interval": 2, "save_interval": 2, "keep_checkpoints": 0},
        "data": {"train_data_paths": [str(data)], "val_data_paths": [str(data)]},
        "sft": {"batch_size": 4},
        "rollout": {"model_dir": str(model)},
        "actor": {"model": {"tensor_model_parallel_size": 2, "precision": "fp32"}, "optim": {"lr": 1e-3, "lr_warmup_steps": 2}},
    }  # fmt: skip
    for key, value in overrides.items():
        *path, last = key.split("__")
        section = config
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config: Path, *words: str, command: str = "sft") -> subprocess.CompletedProcess[str]:
    return tiny_run.run(config, *words, command=command)


def metrics(folder: Path, name: str = "tiny") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path, step: int, name: str = "tiny") -> dict[str, torch.Tensor]:
    step_dir = folder / "logs" / name / "checkpoints" / f"step_{step:06d}"
    return {f"{f.parent.name}/{f.name}:{k}": t for f in sorted(step_dir.rglob("*.safetensors")) for k, t in load_file(f).items()}


def test_a_run_in_one_process_learns_resumes_bit_for_bit_and_opens_in_transformers(tmp_path: Path, model: Path) -> None:
    config = write_run(tmp_path, model, **LOCAL)
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning: 11 of 11 examples of data.val_data_paths are in data.train_data_paths too" in done.stderr
    assert "11 of 11 examples (" in done.stderr and f"step 5/{STEPS}  loss " in done.stderr and "held-out loss: " in done.stderr
    lines = metrics(tmp_path)
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4, 5]
    assert [m["step"] for m in lines if "sft/val_loss" in m] == [0, 2, 4, 5]
    assert undocumented({name for m in lines for name in m} - {"step", "time"}) == []
    assert lines[-1]["sft/val_loss"] < 0.9 * lines[0]["sft/val_loss"]
    assert [m["sft/lr"] for m in lines[1:]] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3])
    whole = tensors(tmp_path, STEPS)
    status = json.loads((tmp_path / "logs" / "tiny" / "status.json").read_text())
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", STEPS, STEPS)

    again = run(config, f"runner.resume_dir={tmp_path / 'logs/tiny/checkpoints/step_000002'}")
    assert again.returncode == 0 and "goes on after step 2" in again.stderr, again.stderr[-4000:]
    repeated = tensors(tmp_path, STEPS)
    assert whole.keys() == repeated.keys() and all(torch.equal(whole[k], repeated[k]) for k in whole)
    unchanging = lambda m: {k: v for k, v in m.items() if k == "step" or k.startswith("sft/")}
    assert list(map(unchanging, metrics(tmp_path))) == list(map(unchanging, lines))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = tmp_path / "logs" / "tiny" / "checkpoints" / "latest" / "hf"
    opened, tokenizer = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32), AutoTokenizer.from_pretrained(hf)
    total, count = 0.0, 0
    for row in map(json.loads, (tmp_path / "data.jsonl").read_text().splitlines()):
        prompt, response = tokenizer(row["prompt"]).input_ids, [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logprobs = opened(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, count = total - logprobs.sum().item(), count + len(response)
    assert total / count == pytest.approx(lines[-1]["sft/val_loss"], rel=1e-5)

    refused = run(
        config, f"runner.resume_dir={tmp_path / 'logs/tiny/checkpoints/step_000002'}",
        'cluster.component_placement={"actor,rollout,reward": all}', "runner.experiment_name=rl", "rollout.rollout_backend=embedded",
        "algorithm.sampling_params.max_new_tokens=16", "data.max_prompt_length=48", "data.answer_key=response", command="train",
    )  # fmt: skip
    assert refused.returncode == 2 and "is a checkpoint of `rlinf sft`, and this is `rlinf train`" in refused.stderr, refused.stderr


@pytest.mark.slow
def test_tensor_parallel_ranks_under_ray_give_the_same_curve(tmp_path: Path, model: Path) -> None:
    weights = {"sft__reweighting": "lin_upper", "sft__reweighting_burn_in": 2, "runner__save_interval": -1}
    alone, ranks = write_run(tmp_path, model, "alone", **LOCAL, **weights), write_run(tmp_path, model, "ranks", **weights)
    for config in (alone, ranks):
        done = run(config)
        assert done.returncode == 0, done.stderr[-4000:]
    for name in ("sft/loss", "sft/objective", "sft/grad_norm", "sft/val_loss"):
        expected, got = ([m[name] for m in metrics(tmp_path, run) if name in m] for run in ("alone", "ranks"))
        assert len(got) >= 4 and got == pytest.approx(expected, rel=1e-4)
    assert all(abs(m["sft/objective"] - m["sft/loss"]) > 1e-4 for m in metrics(tmp_path, "ranks")[3:])


@pytest.mark.slow
def test_checkpoints_in_the_background_hold_the_same_bits(tmp_path: Path, model: Path) -> None:
    for config in (
        write_run(tmp_path, model, "front", **LOCAL),
        write_run(tmp_path, model, "back", runner__async_checkpoint=True, **LOCAL),
    ):
        done = run(config)
        assert done.returncode == 0, done.stderr[-4000:]
    for step in (2, 4, STEPS):
        front, back = (tensors(tmp_path, step, name) for name in ("front", "back"))
        assert front.keys() == back.keys() and all(torch.equal(front[k], back[k]) for k in front)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "slots"), [(1, 1, 2), (1, 2, 2), (2, 2, 4)], ids=["dp2", "pp2", "tp2 pp2"])
def test_each_layout_gives_the_same_curve(tmp_path: Path, model: Path, tp: int, pp: int, slots: int) -> None:
    layout = {
        "cluster__num_gpus_per_node": slots,
        "actor__model__tensor_model_parallel_size": tp,
        "actor__model__pipeline_model_parallel_size": pp,
    }
    for config in (write_run(tmp_path, model, "alone", **LOCAL), write_run(tmp_path, model, "ranks", **layout)):
        done = run(config)
        assert done.returncode == 0, done.stderr[-4000:]
    expected, got = ([m["sft/loss"] for m in metrics(tmp_path, name)[1:]] for name in ("alone", "ranks"))
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_grpo_starts_from_what_fine_tuning_leaves(tmp_path: Path, model: Path) -> None:
    from tests.tiny_run import write_run as write_rl_run

    assert run(write_run(tmp_path, model, **LOCAL)).returncode == 0
    hf = tmp_path / "logs" / "tiny" / "checkpoints" / "latest" / "hf"
    (tmp_path / "rl").mkdir()
    config = write_rl_run(
        tmp_path / "rl", cluster__backend="local", cluster__num_gpus_per_node=1, cluster__component_placement={"actor,rollout,reward": "0"},
        actor__model__tensor_model_parallel_size=1, actor__model__pipeline_model_parallel_size=1, rollout__model_dir=str(hf),
        runner__max_steps=1,
    )  # fmt: skip
    done = run(config, command="train")
    assert done.returncode == 0, done.stderr[-4000:]


def test_dry_run_prints_the_actor_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "smollm2-135m-sft-cpu", "--dry-run", "sft.batch_size=16"]) == 0
    out = capsys.readouterr().out
    assert "16 examples, 1 optimizer step" in out and "actor    1 rank(s)" in out and "rollout " not in out and "nothing was started" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sft.batch_size=0"], "sft.batch_size = 0 (command line): must be at least 1"),
        (["sft.reweighting=linear"], "sft.reweighting"),
        (["sft.reweighting_burn_in=5"], "has a meaning only with sft.reweighting"),
        (["sft.reweighting_temperature=0"], "must be greater than 0"),
        (["sft.response_key="], "sft.response_key"),
        (["sft.batchsize=3"], "did you mean sft.batch_size?"),
        (["cluster.component_placement={rollout: all}"], "cluster.component_placement: actor has no devices"),
        (["cluster.backend=local", "cluster.num_gpus_per_node=2"], "cluster.backend: local is one process"),
        (["runner.max_tokens_per_mbs=64"], "runner.max_tokens_per_mbs"),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    code = main(["sft", "smollm2-135m-sft-cpu", "--dry-run", *words])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("rlinf: ") and expected in err


def test_fewer_examples_than_a_batch_is_the_users_mistake(tmp_path: Path, model: Path) -> None:
    done = run(write_run(tmp_path, model, **LOCAL), "sft.batch_size=12")
    assert done.returncode == 2 and "sft.batch_size is 12, but data.train_data_paths hold only 11" in done.stderr
