"""Whole runs of a tiny random model, everything real: Ray, Megatron ranks over gloo, the engine, verdicts, weight sync, checkpoints."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlinf.data.token_values import decode
from rlinf.metrics.names import undocumented
from tests.tiny_run import ONE_PROCESS, ROOT, STEPS, lines, run, write_run


def check_records(run_dir: Path) -> None:
    """What a run writes for its readers: every trained sample with its numbers, some with their tokens; where it ran; how it ended."""
    for step in range(1, STEPS + 1):
        samples, tokens = (
            [json.loads(line) for line in (run_dir / "samples" / f"{kind}_{step:06d}.jsonl").open()] for kind in ("step", "tokens")
        )
        assert {row["sample_id"] for row in samples} == {row["sample_id"] for row in tokens} and len(tokens) == 16
        assert max(row["gap_max"] for row in tokens) == pytest.approx(
            lines(run_dir.parent.parent)[step]["train/rollout_logprob_gap_max"], rel=1e-3
        )
        response = {row["sample_id"]: row["response"] for row in samples}
        in_full = [row for row in tokens if "pieces" in row]
        assert 3 <= len(in_full) <= 7 and all("".join(row["pieces"]) == response[row["sample_id"]] for row in in_full)
        assert all(len(decode(row[name])) == len(row["pieces"]) for row in in_full for name in ("advantages", "log_ratios", "gaps"))
    (environment,) = [json.loads(line) for line in (run_dir / "environment.jsonl").open()]
    assert environment["packages"]["torch"] and environment["first_step"] == 1
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "finished" and status["step"] == status["total_steps"] == STEPS
    assert set(status["components"]) == {"actor", "rollout", "reward"}


def test_tp2_pp2_run_checkpoint_and_resume(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "prompts of data.val_data_paths are in data.train_data_paths too, the first is " in done.stderr
    metrics = lines(tmp_path)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert all(math.isfinite(m["train/loss"]) and m["train/entropy_loss"] > 0 and m["train/grad_norm"] > 0 for m in metrics[1:])
    assert all(m["train/rollout_logprob_gap_max"] <= 1e-4 for m in metrics[1:])  # fp32: engine and actor are one policy
    assert all(abs(m["train/first_minibatch_ratio"] - 1) <= 1e-6 and m["train/first_minibatch_clip_fraction"] == 0 for m in metrics[1:])
    assert undocumented({name for m in metrics for name in m} - {"step", "time"}) == []
    run_dir = tmp_path / "logs" / "tiny"
    check_records(run_dir)
    assert (run_dir / "checkpoints" / "latest").resolve().name == "step_000003"
    final = load_file(run_dir / "checkpoints" / "step_000003" / "hf" / "model-00001-of-00002.safetensors")

    report = run_dir / "report.html"
    assert f"report: {report}" in done.stderr and "tokens_000003" not in report.read_text() and report.stat().st_size > 50_000

    refused = run(config)
    assert refused.returncode == 2 and "runner.resume_dir=auto" in refused.stderr

    again = run(config, f"runner.resume_dir={run_dir / 'checkpoints' / 'step_000002'}")
    assert again.returncode == 0, again.stderr[-4000:]
    assert [m["step"] for m in lines(tmp_path)] == [0, 1, 2, 3]
    repeated = load_file(run_dir / "checkpoints" / "step_000003" / "hf" / "model-00001-of-00002.safetensors")
    assert all((final[name] == repeated[name]).all() for name in final)  # the interrupted step again, bit for bit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "pp", "cp", "slots"),
    [(1, 1, 1, "0"), (2, 1, 1, "0-1"), (1, 2, 1, "0-1"), (1, 1, 1, "0-1"), (1, 1, 2, "0-1")],
    ids=["one", "tp2", "pp2", "dp2", "cp2"],
)
def test_each_layout_runs_a_whole_job(tmp_path: Path, tp: int, pp: int, cp: int, slots: str) -> None:
    placement, transport = {"actor": slots, "rollout,reward": "0"}, "broadcast" if pp > 1 else "device_ipc" if tp > 1 else "auto"
    config = write_run(
        tmp_path, cluster__component_placement=placement, actor__model__tensor_model_parallel_size=tp,
        actor__model__pipeline_model_parallel_size=pp, actor__model__context_parallel_size=cp,
        rollout__weight_transport=transport, rollout__max_engine_restarts=0,
    )  # fmt: skip
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = lines(tmp_path)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert all(m["train/rollout_logprob_gap_max"] <= 1e-4 and abs(m["train/first_minibatch_ratio"] - 1) <= 1e-6 for m in metrics[1:])
    assert all(m["train/grad_norm"] > 0 for m in metrics[1:])  # so what the engines follow are weights that change
    check_records(tmp_path / "logs" / "tiny")


def test_one_process_without_ray_in_which_actor_and_engine_take_turns(tmp_path: Path) -> None:
    config = write_run(tmp_path, rollout__offload=True, rollout__weight_transport="disk", actor__offload_grad=True, **ONE_PROCESS)
    done = run(config)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [m["step"] for m in lines(tmp_path)] == [0, 1, 2, 3]
    assert list((tmp_path / "logs" / "tiny" / "weights").iterdir()) == []  # by which they came


def test_validation_samples_several_answers_to_problems_of_several_files(tmp_path: Path) -> None:
    """Five answers to each, in groups of four as in training; the files have curves of their own, and metadata comes along."""
    config = write_run(
        tmp_path, validation={"n": 5, "temperature": 1.0, "max_new_tokens": 9}, runner__max_steps=1, runner__save_interval=0, **ONE_PROCESS
    )
    (tmp_path / "hard.jsonl").write_text(json.dumps({"prompt": "1?", "query_id": "h", "solutions": ["1"], "metadata": {"level": 5}}) + "\n")
    done = run(config, f"data.val_data_paths=[{tmp_path / 'data.jsonl'},{tmp_path / 'hard.jsonl'}]")
    assert done.returncode == 0, done.stderr[-4000:]
    for step, metrics in enumerate(lines(tmp_path)):
        rows = [json.loads(line) for line in (tmp_path / "logs" / "tiny" / "samples" / f"validation_{step:06d}.jsonl").open()]
        assert len(rows) == len({row["sample_id"] for row in rows}) == 5 * 25 and max(row["length"] for row in rows) == 9
        hard = [row for row in rows if row["sample_id"].split(".")[2].startswith("h/")]
        assert [row["metadata"] for row in rows if "metadata" in row] == [{"level": 5}] * 2  # once in each group
        assert len(hard) == 5 and len({row["response"] for row in hard}) > 1 and all(row["prompt"] == "1?" for row in hard)
        assert metrics["eval/response_length/hard"] == pytest.approx(sum(row["length"] for row in hard) / 5)
        whole, files = metrics["eval/response_length"], [metrics[f"eval/response_length/{name}"] for name in ("data", "hard")]
        assert whole == pytest.approx((24 * files[0] + files[1]) / 25)
        assert {f"eval/{name}" for name in ("accuracy/data", "accuracy/hard", "pass_at_n", "pass_at_n/hard")} <= metrics.keys()
        assert undocumented(metrics.keys() - {"step", "time"}) == []


ON_GPUS = """
import sys
from rlinf.cli import main
from rlinf.launch import train as launch

class OnGpus:
    device = "cuda"
    def __init__(self, cluster): self.cluster = cluster
    def __getattr__(self, name): return getattr(self.cluster, name)

launch_workers = launch.launch_workers
launch.launch_workers = lambda cluster, plan, config: launch_workers(OnGpus(cluster), plan, config)
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_engines_that_wait_for_the_actor_and_sleep_until_the_first_weights_change_no_number(tmp_path: Path) -> None:
    """As on GPUs that both share; also from a checkpoint."""
    words = {"rollout__offload": True, "actor__offload_grad": True}
    plain = run(write_run(tmp_path, "plain", **words))
    assert plain.returncode == 0, plain.stderr[-4000:]
    env, checkpoint = dict(os.environ, PYTHONPATH=str(ROOT)), tmp_path / "logs" / "waiting" / "checkpoints" / "step_000002"
    command = [sys.executable, "-c", ON_GPUS, str(write_run(tmp_path, "waiting", **words))]
    for resumed in ((), (f"runner.resume_dir={checkpoint}",)):
        done = subprocess.run([*command, *resumed], capture_output=True, text=True, timeout=240, env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        losses = [[m.get("train/loss") for m in lines(tmp_path, name)] for name in ("plain", "waiting")]
        assert losses[0] == losses[1] and len(losses[0]) == 4
