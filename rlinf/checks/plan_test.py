"""Plans: what ships fits, what does not fit is named with a change that does, and the time of a step moves the right way."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest

from rlinf.checks.plan import Forecast, changed, choose_device, forecast, nearest_fit
from rlinf.cli import main
from rlinf.config.load import EXAMPLES, load
from rlinf.config.model import planned_model_config
from rlinf.config.schema import Config
from rlinf.scheduling.devices import GPUS, cpu_device
from rlinf.scheduling.flops import Work, forward_flops
from rlinf.weights.architecture import Architecture, read_architecture


def read(name: str, *words: str) -> tuple[Config, Architecture, dict[str, Any]]:
    config = load(name, list(words)).config
    hf, _ = planned_model_config(config.rollout.model_dir)
    assert hf is not None
    return config, read_architecture(hf), hf


@pytest.mark.parametrize("name", [p.stem for p in EXAMPLES.glob("qwen*.yaml")])
@pytest.mark.parametrize("device", ["h100", "a100"])
def test_every_gpu_recipe_fits_80_gb(capsys: pytest.CaptureFixture[str], name: str, device: str) -> None:
    start = time.monotonic()
    code = main(["plan", name, "--device", device])
    out = capsys.readouterr().out
    assert code == 0 and "it fits" in out and "fullest while training" in out and "forward and backward" in out
    assert time.monotonic() - start < 5


def test_json_holds_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen2.5-7b-grpo-megatron", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    actor = told["actor"][0]
    assert told["seats"] == {"actor": 128, "rollout": 64, "reward": 16} and told["fits"] and told["change"] is None
    assert actor["weights"] == 2 * actor["parameters"] and actor["gradients"] == 4 * actor["parameters"]
    assert actor["optimizer"] == -(-12 * actor["parameters"] // 32)  # DP 32
    assert actor["parameters"] == 1_904_057_344 and told["phases"]["training"] < told["limit"]


def test_the_table_names_the_logits_that_are_there_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    name = "qwen3-30b-a3b-grpo-megatron"  # two stages, of which the last has the head
    assert main(["plan", name, "--json"]) == 0
    first, last = json.loads(capsys.readouterr().out)["actor"]
    rows = 151936 // 4  # of the vocabulary, on a rank of TP 4
    assert (first["logits_tokens"], first["logits"]) == (0, 0)
    assert last["logits_tokens"] == 2**30 // (2 * rows) and last["logits"] == 2 * rows * last["logits_tokens"] + 3 * 2**26
    assert last["logits"] < last["workspace"]
    assert main(["plan", name]) == 0
    stage_0, stage_1 = (line for line in capsys.readouterr().out.splitlines() if "actor rank of stage" in line)
    assert "logits" not in stage_0 and f"(logits of {last['logits_tokens']:,} tokens at a time: {last['logits'] / 2**30:.1f})" in stage_1


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("rtx4090", []),
        ("a100-40g", []),
        ("h100", ["rollout.gpu_memory_utilization=0.97"]),
        ("l40s", ["rollout.rollout_backend=embedded", "rollout.offload=false"]),
    ],
)
def test_what_does_not_fit_is_named_and_the_change_fits(capsys: pytest.CaptureFixture[str], device: str, words: list[str]) -> None:
    name = "qwen2.5-1.5b-single-gpu"
    start = time.monotonic()
    code = main(["plan", name, "--device", device, "--json", *words])
    told = json.loads(capsys.readouterr().out)
    assert time.monotonic() - start < 5
    assert code == 2 and not told["fits"] and told["trouble"]
    config, arch, _ = read(name, *words)
    if told["change"]:
        assert forecast(changed(config, told["change"]), arch, GPUS[device]).trouble == ()
    else:  # 1.5B's optimizer alone takes 20 GiB: nothing in two changes helps on one 24 GB card, but adapters do
        assert device == "rtx4090" and told["change_with_adapters"]["actor.lora.rank"] == 32
        assert forecast(changed(config, told["change_with_adapters"]), arch, GPUS[device]).trouble == ()


def test_a_plan_that_fits_names_a_faster_one_with_less_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    name = "qwen2.5-1.5b-grpo-megatron"
    assert main(["plan", name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    config, arch, _ = read(name)
    spared = told["less_recomputation"]
    better = forecast(changed(config, spared["change"]), arch, GPUS["h100"])
    assert not better.trouble and better.step_seconds < sum(told["seconds"].values())
    assert set(spared["change"]) == {f"actor.model.recompute_{key}" for key in ("granularity", "method", "num_layers")}
    words = [f"{key}={'null' if value is None else value}" for key, value in spared["change"].items()]
    assert main(["plan", name, *words]) == 0
    assert "fits as well" not in capsys.readouterr().out  # nothing is left to be spared
    assert main(["plan", name]) == 0
    assert f"fits as well, and is faster: {' '.join(words)}" in capsys.readouterr().out


def test_the_nearest_change_is_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    config, arch, hf = read("qwen2.5-1.5b-single-gpu", "rollout.gpu_memory_utilization=0.95")
    assert forecast(config, arch, GPUS["h100"]).trouble
    change = nearest_fit(config, arch, hf, GPUS["h100"], None)
    assert change is not None and set(change) == {"rollout.gpu_memory_utilization"} and change["rollout.gpu_memory_utilization"] <= 0.9
    assert main(["plan", "qwen2.5-1.5b-single-gpu", "rollout.gpu_memory_utilization=0.95"]) == 2
    assert "nearest change that fits: rollout.gpu_memory_utilization=" in capsys.readouterr().out


def test_offloading_keeps_the_actor_out_of_the_rollout() -> None:
    config, arch, _ = read("qwen2.5-1.5b-single-gpu")
    away = forecast(config, arch, GPUS["h100"])
    config.actor.offload_weight = config.actor.offload_grad = config.actor.offload_optimizer = False
    kept = forecast(config, arch, GPUS["h100"])
    actor = away.ranks["actor"][0]
    assert kept.phases["rollout"] - away.phases["rollout"] == actor.weights + actor.gradients + actor.optimizer
    assert kept.phases["training"] == away.phases["training"]
    assert kept.phases["weights"] - away.phases["weights"] == actor.gradients + actor.optimizer
    assert kept.seconds["weights"] < away.seconds["weights"]
    assert away.host == actor.weights + actor.optimizer and kept.host == 0  # gradients are freed
    config.algorithm.kl_beta = 0.1
    assert forecast(config, arch, GPUS["h100"]).host == actor.weights


@pytest.mark.parametrize("name", ["qwen2.5-1.5b-single-gpu", "qwen2.5-7b-grpo-megatron"])
def test_an_engine_that_does_not_sleep_keeps_its_memory_while_the_actor_trains(name: str) -> None:
    config, arch, hf = read(name)
    device = GPUS["h100"]
    asleep = forecast(config, arch, device)
    config.rollout.offload = False
    awake = forecast(config, arch, device)
    held = int(config.rollout.gpu_memory_utilization * device.memory)
    assert awake.phases["training"] - asleep.phases["training"] == held
    assert awake.phases["weights"] - asleep.phases["weights"] == held - awake.engine.weights
    assert awake.phases["rollout"] == asleep.phases["rollout"]
    assert [t.split(":")[0] for t in awake.trouble] == ["training"] and not asleep.trouble
    assert nearest_fit(config, arch, hf, device, None) == {"rollout.offload": True}


def test_an_embedded_engine_sleeps_too() -> None:
    config, arch, _ = read("qwen2.5-1.5b-single-gpu", "rollout.rollout_backend=embedded")
    asleep = forecast(config, arch, GPUS["h100"])
    config.rollout.offload = False
    engine = asleep.engine
    held = engine.weights + engine.kv_token * engine.tokens
    assert forecast(config, arch, GPUS["h100"]).phases["training"] - asleep.phases["training"] == held


CRITIC = ["algorithm.adv_type=gae", "critic.optim.lr=1e-5", "cluster.component_placement={'actor,critic,rollout,reward': all}"]
OFFLOADED = [f"critic.offload_{name}=true" for name in ("weight", "grad", "optimizer")]


def test_a_critic_is_counted_beside_the_actor() -> None:
    """While it is trained, the actor still has its weights: they have not been published yet."""
    config, arch, hf = read("qwen2.5-1.5b-single-gpu", *CRITIC, *OFFLOADED)
    alone, plan = forecast(read("qwen2.5-1.5b-single-gpu")[0], arch, GPUS["h200"]), forecast(config, arch, GPUS["h200"])
    (actor,), (critic,) = plan.ranks["actor"], plan.ranks["critic"]
    context = GPUS["h200"].context
    assert critic.parameters == actor.parameters - arch.vocab * arch.hidden + arch.hidden  # one number for each token; not tied
    assert plan.phases["training"] == max(alone.phases["training"] + context, critic.total + actor.weights + 2 * context + _serving(alone))
    assert plan.phases["rollout"] - alone.phases["rollout"] == context
    forward = plan.seconds["values"]
    assert 0 < forward < plan.seconds["forward and backward"] / 3 and plan.seconds["critic's update"] > 3 * forward
    assert not forecast(config, arch, GPUS["h100"]).trouble  # two models of 1.5 billion with Adam's state on 80 GB, in turns
    kept = forecast(read("qwen2.5-1.5b-single-gpu", *CRITIC)[0], arch, GPUS["h200"])
    assert kept.phases["rollout"] - plan.phases["rollout"] == critic.held
    assert forecast(read("qwen2.5-1.5b-single-gpu", *CRITIC)[0], arch, GPUS["h100"]).trouble


def test_roles_that_share_gpus_with_engines_and_not_with_each_other_do_not_add_up() -> None:
    apart = ["algorithm.adv_type=gae", "critic.optim.lr=1e-5", "cluster.num_gpus_per_node=8", "actor.offload_weight=false",
             "actor.offload_grad=false", "actor.offload_optimizer=false"]  # fmt: skip
    config, arch, _ = read(
        "qwen2.5-1.5b-single-gpu", *apart, "cluster.component_placement={actor: 0-3, critic: 4-7, 'rollout,reward': all}"
    )
    plan = forecast(config, arch, GPUS["h100"])
    (actor,), (critic,) = plan.ranks["actor"], plan.ranks["critic"]
    together = forecast(changed(config, {"cluster.component_placement": {"actor,critic,rollout,reward": "all"}}), arch, GPUS["h100"])
    both = together.ranks["actor"][0].held + together.ranks["critic"][0].held + GPUS["h100"].context
    assert plan.phases["weights"] == together.phases["weights"] - both + max(actor.held, critic.held)


def _serving(plan: Forecast) -> int:
    """What sleeping engines still have, and the process of the actor: what is there beside its own bytes."""
    return plan.phases["training"] - plan.ranks["actor"][0].total - GPUS["h200"].context


def test_a_teacher_of_another_size_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = [
        "cluster.component_placement={'actor,token_reward,rollout,reward': all}", "algorithm.adv_type=reinforce++",
        "algorithm.dense_rewards=true", "token_reward.model_dir=/nowhere/DeepSeek-R1-Distill-Qwen-7B", "token_reward.output=teacher",
    ]  # fmt: skip
    assert main(["plan", "qwen2.5-1.5b-single-gpu", "--device", "h200", "--json", *teacher, "token_reward.offload_weight=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    (rank,) = told["token_reward"]
    assert rank["parameters"] == 7_615_616_512 and rank["weights"] == 2 * rank["parameters"] and not rank["gradients"] + rank["optimizer"]
    assert told["seats"]["token_reward"] == 1 and told["seconds"]["token rewards"] > told["seconds"]["forward and backward"]
    tight = ["plan", "qwen2.5-1.5b-single-gpu", "--device", "h100", *teacher, "rollout.gpu_memory_utilization=0.7"]
    assert main(tight) == 2 and main([*tight, "token_reward.offload_weight=true"]) == 0
    assert "token_reward rank: weights 14.2  workspace" in capsys.readouterr().out
    teacher[3] = "token_reward.model_dir=/nowhere/other"
    assert main(["plan", "qwen2.5-1.5b-single-gpu", *teacher]) == 2 and "token_reward.model_dir: /nowhere/other" in capsys.readouterr().err


def test_a_critic_on_a_cpu_takes_memory_of_the_node() -> None:
    ppo, arch, _ = read("smollm2-135m-ppo-cpu")
    grpo, _, _ = read("smollm2-135m-grpo-cpu")
    device = cpu_device(1)
    with_critic, without = forecast(ppo, arch, device), forecast(grpo, arch, device)
    (critic,) = with_critic.ranks["critic"]
    assert with_critic.phases["rollout"] - without.phases["rollout"] == critic.held - critic.gradients + device.context
    assert with_critic.phases["training"] > without.phases["training"] + critic.weights + critic.optimizer


def test_engines_with_gpus_of_their_own_take_nothing_from_the_actor() -> None:
    config, arch, _ = read("qwen2.5-1.5b-grpo-megatron-pipeline")
    plan = forecast(config, arch, GPUS["h100"])
    assert plan.phases["training"] == plan.ranks["actor"][0].total + GPUS["h100"].context and not config.rollout.offload


def test_parts_on_devices_of_their_own_are_told_whether_they_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline, turns, together = "qwen2.5-1.5b-grpo-megatron-pipeline", "but take turns: with algorithm.max_staleness=1", "a step takes"
    assert main(["plan", pipeline, "algorithm.max_staleness=0", "algorithm.loss_type=ppo"]) == 0 and turns in capsys.readouterr().out
    assert main(["plan", pipeline]) == 0
    text = capsys.readouterr().out
    rollout = re.search(r"^ +rollout +([0-9]+[.][0-9])", text, re.MULTILINE)
    assert rollout and f"{together} {float(rollout[1]):.0f} at least" in text and turns not in text
    assert main(["plan", "qwen2.5-1.5b-grpo-megatron"]) == 0
    text = capsys.readouterr().out
    assert turns not in text and together not in text


def test_time_moves_the_right_way() -> None:
    config, arch, _ = read("qwen2.5-1.5b-grpo-megatron")
    base = forecast(config, arch, GPUS["h100"])
    longer = forecast(config, arch, GPUS["h100"], mean_response=20_000)
    older = forecast(config, arch, GPUS["a100"])
    assert (
        longer.seconds["rollout"] > base.seconds["rollout"]
        and longer.seconds["forward and backward"] > base.seconds["forward and backward"]
    )
    assert older.step_seconds > base.step_seconds
    config.cluster.num_nodes = 8
    fewer = forecast(config, arch, GPUS["h100"])
    assert fewer.seconds["forward and backward"] == pytest.approx(2 * base.seconds["forward and backward"], rel=0.01)
    config.algorithm.update_epochs = 3
    passes = forecast(config, arch, GPUS["h100"]).seconds
    assert all(passes[part] == pytest.approx(3 * fewer.seconds[part]) for part in ("forward and backward", "optimizer"))
    assert all(passes[part] == fewer.seconds[part] for part in ("rollout", "log-probabilities"))
    config.algorithm.recompute_logprobs = False
    assert forecast(config, arch, GPUS["h100"]).seconds["log-probabilities"] == 0


def test_pipeline_stages_differ_and_the_first_holds_more_activations() -> None:
    config, arch, _ = read("qwen2.5-7b-grpo-megatron", "actor.model.pipeline_model_parallel_size=4", "actor.model.recompute_num_layers=4")
    stages = forecast(config, arch, GPUS["h100"]).ranks["actor"]
    assert len(stages) == 4 and stages[0].activations > stages[3].activations and stages[0].workspace < stages[3].workspace
    whole, _, _ = read("qwen2.5-7b-grpo-megatron")
    assert sum(s.parameters for s in stages) == forecast(whole, arch, GPUS["h100"]).ranks["actor"][0].parameters


@pytest.mark.parametrize(
    ("setting", "named", "device"),
    [("cpu", None, "cpu"), ("auto", None, "h100"), ("cuda", None, "h100"), ("cpu", "l40s", "l40s"), ("cuda", "cpu", "cpu")],
)
def test_a_plan_is_for_the_device_of_the_configuration_unless_one_is_named(setting: str, named: str | None, device: str) -> None:
    config, *_ = read("qwen2.5-1.5b-single-gpu", f"cluster.device={setting}")
    chosen = choose_device(named, config)
    assert chosen.name == device and chosen.shared == (device == "cpu")


def test_mistakes_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen2.5-1.5b-single-gpu", "--device", "tpu"]) == 2
    assert "--device tpu: not known; known are cpu, h100" in capsys.readouterr().err
    assert main(["plan", "qwen2.5-1.5b-single-gpu", "rollout.model_dir=/nowhere/unheard-of"]) == 2
    assert "a plan needs them" in capsys.readouterr().err


def test_a_mixture_of_experts_is_counted_by_all_and_computed_by_those_of_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    name = "qwen3-30b-a3b-grpo-megatron"
    config, arch, _ = read(name)
    stages = forecast(config, arch, GPUS["h100"]).ranks["actor"]
    assert sum(s.parameters for s in stages) * 4 == pytest.approx(30.5e9, rel=0.01)  # on four tensor-parallel ranks
    active = replace(arch, experts=0, top_k=0, ffn=arch.ffn * arch.top_k)  # a dense model of the same work, but for the router
    assert forward_flops(arch, Work(rows=1)) == pytest.approx(forward_flops(active, Work(rows=1)), rel=0.01)
    assert main(["plan", name]) == 0 and main(["plan", name, "cluster.num_nodes=1"]) == 0
    assert main(["plan", name, "cluster.num_nodes=1", "actor.model.pipeline_model_parallel_size=1"]) == 2
    capsys.readouterr()
    single = ["cluster.num_nodes=1", "cluster.num_gpus_per_node=4", "actor.model.pipeline_model_parallel_size=1"]
    assert main(["plan", name, *single]) == 2
    out = capsys.readouterr().out
    assert """it fits: actor.lora.rank=32 'actor.lora.target_modules=["linear_qkv", "linear_proj"]'""" in out


def test_adapters_of_7b_fit_on_one_gpu_where_all_weights_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    name = "qwen2.5-7b-lora-single-gpu"
    assert main(["plan", name]) == 0 and main(["plan", name, "--device", "l40s"]) == 0
    assert main(["plan", name, "actor.lora.rank=0"]) == 2
    assert "with adapters in place of all weights it fits: actor.lora.rank=32 (docs/lora.md)" in capsys.readouterr().out
    config, arch, _ = read(name)
    plan, whole = forecast(config, arch, GPUS["h100"]), forecast(read(name, "actor.lora.rank=0")[0], arch, GPUS["h100"])
    assert plan.seconds["forward and backward"] < 0.8 * whole.seconds["forward and backward"]
    with_reference = forecast(read(name, "algorithm.kl_beta=0.01")[0], arch, GPUS["h100"])
    assert with_reference.host == plan.host  # the reference policy is the model without adapters
