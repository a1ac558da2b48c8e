"""Every objective and filter of the `algorithm` section in a whole run of a tiny model, in one process: each key does something.

All runs start from the same weights, prompts and sampling noise, so that the first rollout is the same in all of them; what differs after
two steps is what the key did. Runs whose keys must change nothing end with the same weights, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlinf.algorithms.importance import CORRECTIONS
from rlinf.metrics.names import undocumented
from tests.tiny_run import ROOT, run, write_run

KL = ["kl_beta=0.1"]
NARROW = ["ratio_clip_eps=1e-4"]
BF16 = ["rollout.precision=bf16"]  # an engine that is not quite the actor
FIX = [*BF16, "importance_sampling_fix=true"]
CLIPS = {"token": 1.001, "sequence": 1.01, "geometric": 1.001, "k3": 3e-5}
DYNAMIC = ["dynamic_sampling=true"]

Case = tuple[
    list[str], str
]  # words (keys of the section `algorithm` unless they name another), the case from which its weights must differ
CASES: dict[str, Case] = {
    "base": ([], ""),
    **{f"adv {name}": ([f"adv_type={name}"], "base") for name in ("rloo", "dr_grpo", "reinforce++", "reinforce++-baseline")},
    "not normalised": (["normalize_advantages=false"], "base"),
    "gamma": (["gamma=0.9"], "base"),
    "reinforce++ in full": (["adv_type=reinforce++", *KL, "kl_in=reward", "kl_penalty_type=k2", "gamma=0.9"], "adv reinforce++"),
    "loss decoupled-ppo": ([*BF16, "loss_type=decoupled-ppo"], "bf16"),
    **{f"loss {name}": ([f"loss_type={name}"], "base") for name in ("gspo", "gspo-token", "cispo")},
    **{
        f"agg {name}": ([f"loss_agg_func={name}"], "base")
        for name in ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    },
    **{f"{kind} in the loss": ([*KL, f"kl_penalty_type={kind}"], "base") for kind in ("k1", "k2", "k3")},
    **{f"{kind} in the reward": ([*KL, f"kl_penalty_type={kind}", "kl_in=reward"], f"{kind} in the loss") for kind in ("k1", "k2", "k3")},
    "clip": (NARROW, "base"),
    "clip-higher": ([*NARROW, "clip_ratio_high=1e-3"], "clip"),
    "clip-lower": ([*NARROW, "clip_ratio_low=1e-3"], "clip"),
    "dual clip": (["clip_ratio_c=1.0001"], "base"),
    "entropy bonus": (["entropy_bonus=0.01"], "base"),
    "bf16": (BF16, "base"),
    "engine's logprobs": ([*BF16, "recompute_logprobs=false"], "bf16"),
    "cap": ([*BF16, "loss_type=decoupled-ppo", "behav_imp_weight_cap=1.001"], "loss decoupled-ppo"),
    "no correction": ([*FIX, "importance_sampling_clip=1e9"], "bf16"),
    **{
        f"fix {kind}": (
            [*FIX, f"importance_sampling_type={kind}", f"importance_sampling_clip={CLIPS[kind.split('-')[0]]}"],
            "no correction",
        )
        for kind in CORRECTIONS
    },
    "fix low": (
        [*FIX, "importance_sampling_type=token-mask", "importance_sampling_clip=1.001", "importance_sampling_low=0.5"],
        "fix token-mask",
    ),
    "fix normalised": ([*FIX, "importance_sampling_clip=1.001", "importance_sampling_normalize=true"], "fix token-truncate"),
    "overlong filtering": (["overlong_filtering=true"], "base"),
    "subset": (["num_update_sample_per_prompt=2"], "base"),
    "dynamic sampling": (DYNAMIC, "base"),
    "to the end of the data": ([*DYNAMIC, "runner.max_epochs=1", "runner.max_steps=-1", "data.rollout_batch_size=10"], "base"),
}
SAME: dict[str, Case] = {  # words, the case with the same weights
    "again": ([], "base"),
    "all of the group": (["num_update_sample_per_prompt=4"], "base"),
    "fresh tokens need no interpolation": ([*BF16, "loss_type=decoupled-ppo", "recompute_logprobs=false"], "engine's logprobs"),
    "equal weights cancel": (
        ["importance_sampling_fix=true", "importance_sampling_clip=0.5", "importance_sampling_normalize=true"],
        "base",
    ),
    "dynamic sampling, one prompt at a time": (
        [*DYNAMIC, "dynamic_sampling_batch_size=1", "dynamic_sampling_max_batches=40"],
        "dynamic sampling",
    ),
    "dynamic sampling, many at a time": ([*DYNAMIC, "dynamic_sampling_batch_size=13"], "dynamic sampling"),
    "dynamic sampling, resumed": ([*DYNAMIC, "runner.save_interval=1"], "dynamic sampling"),
}
FAST = {
    "again", "adv rloo", "reinforce++ in full", "loss decoupled-ppo", "loss gspo", "agg seq-mean-token-mean", "k3 in the reward",
    "overlong filtering", "subset", "dynamic sampling",
}  # fmt: skip
SCRIPT = """
import json, sys
import torch.distributed as dist
from rlinf.config.load import load
from rlinf.launch import train as launch
from rlinf.training.parallel import mpu

for words in json.loads(sys.argv[2]):
    assert launch.train(load(sys.argv[1], words)) == 0
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
"""


def cases(table: dict[str, Case]) -> list[Any]:
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name, (_, other) in table.items() if other]


def launches(name: str) -> list[list[str]]:
    """The overrides of each start of a case."""
    words = [w if "." in w.partition("=")[0] else f"algorithm.{w}" for w in (CASES | SAME)[name][0]] + [f"runner.experiment_name={name}"]
    return [[*words, "runner.max_steps=1"], [*words, "runner.resume_dir=auto"]] if name.endswith("resumed") else [words]


def write_config(folder: Path, name: str = "tiny", **overrides: object) -> Path:
    """Two steps, in one process unless the overrides say otherwise, of a task in which random bytes are right now and then."""
    one_process = dict(
        cluster__backend="local", cluster__num_gpus_per_node=1, cluster__component_placement={"actor,rollout,reward": "0"},
        actor__model__tensor_model_parallel_size=1, actor__model__pipeline_model_parallel_size=1,
    )  # fmt: skip
    config = write_run(
        folder, name, **one_process | overrides, runner__max_steps=2, runner__val_check_interval=0,
        reward__answer_format="boxed_or_final_number",
        algorithm__sampling_params={"max_new_tokens": 24, "stop": list("aeimqrtz")},
        actor__optim={"lr": 3e-3, "clip_grad": 0.0, "adam_eps": 1.0}, runner__save_interval=-1,
    )  # fmt: skip
    answers = [f"\\boxed{{{d}}}" for d in range(5)]
    records = [{"prompt": f"{i}+{i}=", "task": "math", "query_id": str(i), "solutions": answers} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return config


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The metrics of every case that a selected test needs, by step.

    The last step also has the checksum of the weights and the checkpoint's name.
    """
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path and "seen" in item.fixturenames}
    for name in list(wanted):
        while name := (CASES | SAME)[name][1]:
            wanted.add(name)
    folder = tmp_path_factory.mktemp("objectives")
    config = write_config(folder)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(config), json.dumps([words for name in sorted(wanted) for words in launches(name)])],
        capture_output=True, text=True, timeout=580, cwd=folder, env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: outcome(folder / "logs" / name) for name in wanted}


def outcome(run: Path) -> list[dict[str, Any]]:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    latest = (run / "checkpoints" / "latest").resolve()
    files = sorted((latest / "hf").glob("*.safetensors"))
    steps[-1] |= {"weights": hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest(), "checkpoint": latest.name}
    return steps


@pytest.mark.parametrize("name", cases(CASES))
def test_each_key_changes_what_is_learned(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    steps, other = seen[name], seen[CASES[name][1]]
    assert steps[-1]["weights"] != other[-1]["weights"]
    assert undocumented({m for s in steps for m in s} - {"step", "time", "weights", "checkpoint"}) == []
    if name != "bf16" and not name.startswith(("dynamic", "to the end")):  # another engine, another first batch
        assert {m: steps[0][m] for m in ("rollout/rewards", "rollout/total_tokens")} == {
            m: other[0][m] for m in ("rollout/rewards", "rollout/total_tokens")
        }


@pytest.mark.parametrize("name", cases(SAME))
def test_what_must_not_matter_does_not(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    steps, other = seen[name], seen[SAME[name][1]]
    assert steps[-1]["weights"] == other[-1]["weights"]
    assert [s["train/loss"] for s in steps] == [s["train/loss"] for s in other]


@pytest.mark.parametrize("name", ["overlong filtering", "subset", "dynamic sampling"])
def test_what_is_left_out_is_counted(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    for step in seen[name]:
        trained, samples = step["train/samples"], step["rollout/samples"]
        if name == "overlong filtering":
            assert trained == samples * (1 - step["rollout/truncated"]) < samples
        elif name == "subset":
            assert (trained, samples) == (8, 16)
        else:
            assert trained == 16 == 4 * (step["rollout/prompts_used"] - step["rollout/prompts_filtered"])
            assert samples == 4 * step["rollout/prompts_generated"] >= 4 * step["rollout/prompts_used"]
    if name == "dynamic sampling":
        assert sum(step["rollout/prompts_filtered"] for step in seen[name]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["to the end of the data"])
def test_dynamic_sampling_ends_with_the_data_and_saves(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    """40 prompts in batches of 10: fewer than 4 steps, and no whole batch is left."""
    steps = seen[name]
    used = sum(step["rollout/prompts_used"] for step in steps)
    assert used > 30 and len(steps) < 4 and steps[-1]["checkpoint"] == f"step_{len(steps):06d}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dual clip", "clip", "clip-higher", "cap", *(f"fix {kind}" for kind in CORRECTIONS)])
def test_bounds_are_met_and_counted(seen: dict[str, list[dict[str, Any]]], name: str) -> None:
    metric = {"dual clip": "train/dual_clip_fraction", "clip": "train/clip_fraction", "clip-higher": "train/clip_fraction"}.get(
        name, "train/importance_weight_clipped"
    )
    assert all(0 < step[metric] < 1 for step in seen[name])


EVERYTHING = [
    "adv_type=reinforce++", "kl_beta=0.1", "kl_in=reward", "gamma=0.95", "entropy_bonus=0.01",
    "importance_sampling_fix=true", "importance_sampling_clip=1.001", "importance_sampling_normalize=true",
    "overlong_filtering=true", "dynamic_sampling=true", "loss_agg_func=seq-mean-token-mean",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1)], ids=["dp2 pp2", "dp2 tp2"])
def test_token_level_terms_do_not_depend_on_the_layout(tmp_path: Path, tp: int, pp: int) -> None:
    """Four ranks under Ray against one process: the same groups, and the same numbers up to rounding."""
    ranks = dict(
        cluster__backend="ray", cluster__num_gpus_per_node=4, cluster__component_placement={"actor": "0-3", "rollout,reward": "0"},
        actor__model__tensor_model_parallel_size=tp, actor__model__pipeline_model_parallel_size=pp,
    )  # fmt: skip
    found = []
    for name, overrides in (("one", {}), ("four", ranks)):
        config = write_config(tmp_path, name, rollout__precision="bf16", **overrides)
        done = run(config, *(f"algorithm.{w}" for w in EVERYTHING))
        assert done.returncode == 0, done.stderr[-4000:]
        steps = outcome(tmp_path / "logs" / name)
        found.append([{k: v for k, v in s.items() if k.startswith(("train/", "rollout/")) and "tokens" not in k} for s in steps])
    one, four = found
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    assert 0 < one[1]["train/importance_weight_clipped"] < 1 and one[1]["train/kl_loss"] > 0
