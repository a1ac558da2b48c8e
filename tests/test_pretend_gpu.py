"""What a GPU does to the code, on a GPU that is none (tests/pretend_gpu): its own tests, and whole runs of every kind of placement."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from rlinf.metrics.logger import read_metrics
from tests.pretend_gpu import IMPOSSIBLE, ROOT, environment
from tests.test_critic_run import CRITIC
from tests.tiny import make_tiny_model
from tests.tiny_run import ONE_PROCESS, write_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(IMPOSSIBLE is not None, reason=str(IMPOSSIBLE))]

NO_KERNELS = "test_a_profile_has_the_kernels_of_the_device"  # CUDA's own
STRICT = """
import torch
from rlinf import device as devices

def refused(work):
    try:
        work()
    except RuntimeError as error:
        return "of the GPU and of the host" in str(error) or "to be on the same device" in str(error)

gpu = torch.device("cuda", 0)
a, b = torch.ones(3, 4, device=gpu, requires_grad=True), torch.ones(4, 3)
assert refused(lambda: a @ b) and refused(lambda: a + b.t()) and refused(lambda: torch.cat([a, b.t()]))
rows = torch.tensor([0, 2])  # CUDA takes indices of the host, and no values
assert a[rows].device == gpu and refused(lambda: a.detach().index_put_((rows,), torch.zeros(2, 4)))
(a @ b.to(gpu) * 2.0).sum().backward()  # a number is of no device
assert a.grad.device == gpu and a.grad.tolist() == [[6.0] * 4] * 3

host = torch.zeros(4, pin_memory=True)
there = torch.arange(4.0, device=gpu)
host.copy_(there, non_blocking=True)
assert host.tolist() == [0.0] * 4, "seen before anybody waited"
devices.synchronize(gpu)
assert host.tolist() == [0.0, 1.0, 2.0, 3.0]
there.copy_(host, non_blocking=True)
host.fill_(9.0)
assert (there + 0).tolist() == [9.0] * 4, "the GPU reads the host's memory when it comes to it"

q, k, v = (torch.randn(1, heads, 9, 8, device=gpu, requires_grad=True) for heads in (4, 2, 2))
out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
assert "FlashAttention" in out.grad_fn.name()  # and its memory: no scores

before = devices.memory_in_use(gpu)
big = torch.empty(1 << 20, dtype=torch.uint8, device=gpu)
assert devices.memory_in_use(gpu) == before + (1 << 20)
big.untyped_storage().resize_(0)
assert devices.memory_in_use(gpu) == before and devices.peak_memory(gpu) >= before + (1 << 20)
"""


def test_the_pretend_gpu_is_strict() -> None:
    """About devices, about copies that nobody waits for, about memory: what passes on it has to mean something."""
    done = subprocess.run([sys.executable, "-c", STRICT], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("layers", ["local", "transformer engine"])
def test_the_tests_of_a_gpu_pass(layers: str, tmp_path: Path) -> None:
    """Those of training also with Transformer Engine, which is what `auto` takes in 16 bits where it is installed."""
    files, least = (["tests/gpu"], 36) if layers == "local" else (["tests/gpu/test_training.py"], 20)
    words = [
        "-m", "gpu", "-n", "0", "--deselect", f"tests/gpu/test_training.py::{NO_KERNELS}[cuda]", f"--junitxml={tmp_path / 'tests.xml'}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *words], env=environment(1, layers != "local"), cwd=ROOT, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    suite = next(xml.etree.ElementTree.parse(tmp_path / "tests.xml").getroot().iter("testsuite"))
    ran = [case.get("name") for case in suite.iter("testcase") if case.find("skipped") is None]
    skipped = {case.get("name") for case in suite.iter("testcase") if case.find("skipped") is not None}
    assert len(ran) >= least and len(skipped) == (8 if layers == "local" else 0), skipped  # for want of SGLang and Transformer Engine


ALL_AWAY = {"actor__offload_weight": True, "actor__offload_grad": True, "actor__offload_optimizer": True, "rollout__offload": True}
BF16 = {"actor__model__precision": "bf16", "rollout__precision": "bf16"}
FP16 = {"actor__model__precision": "fp16", "rollout__precision": "fp16"}
RECOMPUTED = {
    f"actor__model__recompute_{name}": value for name, value in (("granularity", "full"), ("method", "uniform"), ("num_layers", 1))
}


def layout(tp: int, pp: int, cp: int = 1) -> dict[str, object]:
    return {
        "actor__model__tensor_model_parallel_size": tp, "actor__model__pipeline_model_parallel_size": pp,
        "actor__model__context_parallel_size": cp,
    }  # fmt: skip


RUNS: dict[str, tuple[int, dict[str, str], dict[str, object]]] = {  # GPUs, placement, everything else
    "collocated, all of it off the device, weights by CUDA IPC": (
        2, {"actor": "0-1", "rollout,reward": "0-1"},
        layout(1, 1) | ALL_AWAY | {"rollout__weight_transport": "device_ipc", "rollout__max_engine_restarts": 0},
    ),
    "fp16 with a moving loss scale, TP x PP, recomputation": (4, {"actor": "0-3", "rollout,reward": "0"}, layout(2, 2) | FP16 | RECOMPUTED),
    "bf16, sequence parallel, a reference policy": (
        4, {"actor": "0-3", "rollout,reward": "0"},
        layout(2, 1) | BF16 | {"actor__model__sequence_parallel": True, "algorithm__kl_beta": 0.01},
    ),
    "context parallel, apart, weights by NCCL": (
        4, {"actor": "0-1", "rollout": "2-3", "reward": "0"},
        layout(1, 1, 2) | {"rollout__weight_transport": "broadcast", "rollout__max_engine_restarts": 0},
    ),
    "adapters beside bf16, all of it off the device, a reference policy": (
        2, {"actor,rollout,reward": "all"},
        layout(2, 1) | BF16 | ALL_AWAY | {"actor__lora": {"rank": 4}, "algorithm__kl_beta": 0.01, "rollout__max_engine_restarts": 0},
    ),
    "asynchronous, with a critic": (
        4, {"actor": "0-1", "critic": "1-2", "rollout": "3", "reward": "0"},
        layout(1, 2)
        | {"algorithm__max_staleness": 1, "algorithm__schedule": "wallclock", "algorithm__adv_type": "gae", "critic": CRITIC}
        | {"algorithm__update_epochs": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_takes_the_paths_of_a_gpu(kind: str, tmp_path: Path) -> None:
    gpus, placement, overrides = RUNS[kind]
    config = write_run(
        tmp_path, cluster__device="cuda", cluster__num_gpus_per_node=gpus, cluster__component_placement=placement,
        algorithm__entropy_bonus=0.01, rollout__verify_weights_every=1, runner__val_check_interval=0, **overrides,
    )  # fmt: skip
    steps = trained([str(config)], tmp_path / "logs" / "tiny", gpus)
    assert len(steps) == 3 and all(s["train/grad_norm"] > 0 for s in steps)
    assert max(s["sync/probe_gap_max"] for s in steps if "sync/probe_gap_max" in s) < (0.1 if "16" in kind else 1e-4)


RECIPES = [
    "qwen2.5-1.5b-grpo-megatron", "qwen2.5-1.5b-grpo-megatron-pipeline", "qwen2.5-7b-grpo-megatron", "qwen2.5-1.5b-distill-7b",
    "qwen2.5-7b-lora-single-gpu", "qwen3-30b-a3b-grpo-megatron",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_the_cluster_runs_but_for_its_size(recipe: str, tmp_path: Path) -> None:
    """Every other value is the file's: fp16 and its loss scale, sequence parallel, recomputation, offload, Transformer Engine's layers.
    SGLang needs a real GPU."""
    write_run(tmp_path)
    experts = "a3b" in recipe
    make_tiny_model(tmp_path / "model", "qwen3-moe" if experts else "qwen2", layers=4, heads=4, kv_heads=4)
    apart = recipe.endswith("pipeline")
    placement = '{"actor": "0-1", "rollout": "2-3", "reward": "2-3"}' if apart else '{"actor,rollout,reward": "all"}'
    teacher = []
    if "distill" in recipe:
        placement = '{"actor,token_reward,rollout,reward": "all"}'
        teacher = [f"token_reward.model_dir={make_tiny_model(tmp_path / 'teacher', 'qwen2', layers=2, heads=4, kv_heads=4, seed=9)}"]
    words = [
        "cluster.num_nodes=1", "cluster.num_gpus_per_node=4", f"cluster.component_placement={placement}", "cluster.device=cuda",
        f"rollout.model_dir={tmp_path / 'model'}", f"data.train_data_paths=[{tmp_path / 'data.jsonl'}]", "rollout.rollout_backend=embedded",
        "data.rollout_batch_size=4", "algorithm.group_size=4", "data.max_prompt_length=40", "runner.seq_length=64",
        "algorithm.sampling_params.max_new_tokens=16", "runner.max_steps=2", f"runner.output_dir={tmp_path}", "runner.experiment_name=run",
        "rollout.tensor_parallel_size=1", "algorithm.entropy_bonus=0.01", "actor.model.transformer_impl=transformer_engine",
    ]  # fmt: skip
    if experts:
        words.append("actor.model.tensor_model_parallel_size=2")  # of 4 x 2 ranks half
    steps = trained([recipe, *words, *teacher], tmp_path / "run", 4, with_transformer_engine=True)
    assert len(steps) == 2 and all(s["train/grad_norm"] > 0 for s in steps)


def test_what_is_for_the_cpu_stays_there_beside_a_gpu(tmp_path: Path) -> None:
    """In one process, where no worker's environment hides the GPU; and in the ranks of the proofs."""
    config = write_run(tmp_path, runner__val_check_interval=0, **ONE_PROCESS)
    assert len(trained([str(config)], tmp_path / "logs" / "tiny", 1)) == 3
    proof = [sys.executable, "-m", "pytest", "-n", "0", "rlinf/training/state_test.py", "rlinf/checks/rank_pool_test.py"]
    done = subprocess.run(proof, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]


def trained(words: list[str], folder: Path, gpus: int, with_transformer_engine: bool = False) -> list[dict[str, float]]:
    """The steps of a run that ended well, without a warning."""
    done = subprocess.run(
        [sys.executable, "-m", "rlinf", "train", *words], env=environment(gpus, with_transformer_engine), cwd=ROOT, capture_output=True,
        text=True, timeout=400,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    logs = {log.name: log.read_text() for log in (folder / "workers").glob("*.log")}
    assert "Warning" not in said and not [name for name, text in logs.items() if "Warning" in text], f"{said[-3000:]}\n{logs}"
    steps = [s for s in read_metrics(folder) if s["step"] > 0]
    assert all(math.isfinite(value) for s in steps for name, value in s.items() if name.startswith(("train/", "sync/", "time/")))
    return steps
