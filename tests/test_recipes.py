"""The recipes that ship: values as in the published ones (RLinf's YAMLs for AReaL-boba), and what a variant changes."""

from __future__ import annotations

import pytest

from rlinf.config.load import load, value_of
from rlinf.config.validate import validate
from rlinf.scheduling.placement import build_plan, nodes_of

# RLinf's examples/math/config/qwen2.5-{1.5b,7b}-grpo-megatron.yaml and -pipeline.yaml, under the names that the keys have here.
# Not in the table, on purpose: `inference` (here the actor recomputes), val_check_interval 1 (validation never ran, and had the training
# file), use_valid_token_scale (here the loss always divides by the tokens of the whole batch), a warm-up of a hundredth of ten iterations
# (less than a step), and min_lr, which means nothing where the rate is constant.
PUBLISHED = {
    "cluster.num_nodes": 16, "cluster.num_gpus_per_node": 8, "cluster.component_placement": {"actor,rollout,reward": "all"},
    "runner.max_epochs": 5, "runner.max_steps": -1, "runner.save_interval": 50, "runner.seq_length": 28672,
    "runner.max_tokens_per_mbs": 28672, "runner.logger.logger_backends": ["tensorboard"],
    "data.rollout_batch_size": 512, "data.max_prompt_length": 1024, "data.filter_prompt_by_length": True, "data.prompt_key": "prompt",
    "data.answer_key": "solutions", "data.apply_chat_template": False, "data.shuffle": True, "data.seed": 1234,
    "algorithm.n_minibatches": 4, "algorithm.adv_type": "grpo", "algorithm.normalize_advantages": True, "algorithm.loss_type": "ppo",
    "algorithm.loss_agg_func": "token-mean", "algorithm.kl_beta": 0.0, "algorithm.kl_penalty_type": "k3",
    "algorithm.ratio_clip_eps": 0.2, "algorithm.clip_ratio_low": None, "algorithm.clip_ratio_high": None, "algorithm.clip_ratio_c": None,
    "algorithm.entropy_bonus": 0.0, "algorithm.early_stop_imp_ratio": 5.0, "algorithm.importance_sampling_fix": False,
    "algorithm.sampling_params.temperature": 1.0, "algorithm.sampling_params.top_k": 1_000_000, "algorithm.sampling_params.top_p": 1.0,
    "algorithm.sampling_params.max_new_tokens": 27648,
    "rollout.rollout_backend": "sglang", "rollout.max_running_requests": 64, "rollout.offload": True,
    "rollout.sglang": {"attention_backend": "triton"},
    "actor.model.pipeline_model_parallel_size": 1, "actor.model.sequence_parallel": True, "actor.model.precision": "fp16",
    "actor.model.recompute_granularity": "full", "actor.model.recompute_method": "block", "actor.model.recompute_num_layers": 20,
    "actor.optim.lr": 2e-5, "actor.optim.lr_decay_style": "constant", "actor.optim.lr_warmup_steps": 0, "actor.optim.adam_beta1": 0.9,
    "actor.optim.adam_beta2": 0.95, "actor.optim.adam_eps": 1e-5, "actor.optim.weight_decay": 0.05,
    "actor.offload_weight": True, "actor.offload_grad": True, "actor.offload_optimizer": True,
    "reward.reward_type": "math", "reward.reward_scale": 5.0,
}  # fmt: skip
SMALL, LARGE = {
    "algorithm.group_size": 16, "algorithm.recompute_logprobs": True, "algorithm.shuffle_rollout": False, "actor.optim.clip_grad": 0.8,
    "actor.optim.loss_scale": 65536.0, "actor.model.tensor_model_parallel_size": 2, "rollout.tensor_parallel_size": 1,
    "rollout.gpu_memory_utilization": 0.55,
}, {
    "algorithm.group_size": 32, "algorithm.recompute_logprobs": False, "algorithm.shuffle_rollout": True, "actor.optim.clip_grad": 1.0,
    "actor.optim.loss_scale": None, "actor.optim.loss_scale_window": 5, "actor.model.tensor_model_parallel_size": 4,
    "rollout.tensor_parallel_size": 2, "rollout.gpu_memory_utilization": 0.65,
}  # fmt: skip
PIPELINE = SMALL | {  # published: engines on 0-15, what recomputes and trains on 16-63, on-policy; the last line: ours
    "cluster.num_nodes": 8, "cluster.component_placement": {"rollout,reward": "0-15", "actor": "16-63"},
    "algorithm.normalize_advantages": False, "rollout.gpu_memory_utilization": 0.85, "rollout.offload": False,
    "actor.offload_weight": False, "actor.offload_grad": False, "actor.offload_optimizer": False,
    "algorithm.max_staleness": 1, "algorithm.schedule": "wallclock", "algorithm.loss_type": "decoupled-ppo",
}  # fmt: skip
RECIPES = {"qwen2.5-1.5b-grpo-megatron": SMALL, "qwen2.5-7b-grpo-megatron": LARGE, "qwen2.5-1.5b-grpo-megatron-pipeline": PIPELINE}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_values(name: str) -> None:
    config = load(name).config
    wanted = PUBLISHED | RECIPES[name]
    assert {key: value_of(config, key) for key in wanted} == wanted


def test_ppo_has_the_task_of_grpo_and_a_critic_in_its_place() -> None:
    config, grpo = load("smollm2-135m-ppo-cpu").config, load("smollm2-135m-grpo-cpu").config
    assert config.has_critic and config.algorithm.group_size == 1 and config.model_dir_of("critic") == config.rollout.model_dir
    assert (config.data.train_data_paths, config.data.val_data_paths, config.rollout) == (
        grpo.data.train_data_paths,
        grpo.data.val_data_paths,
        grpo.rollout,
    )
    assert config.data.rollout_batch_size * config.algorithm.group_size == grpo.data.rollout_batch_size * grpo.algorithm.group_size
    assert 0 < config.critic.warmup_steps < config.runner.max_steps and config.critic.value_clip < config.reward.reward_scale


@pytest.mark.parametrize("name", ["smollm2-135m-distill-cpu", "qwen2.5-1.5b-distill-7b"])
def test_what_is_distilled_is_paid_by_the_teacher_alone_token_by_token(name: str) -> None:
    config = load(name).config
    assert config.head_of("token_reward") == "lm" and config.model_dir_of("token_reward") != config.rollout.model_dir
    a = config.algorithm
    assert (a.adv_type, a.gamma, a.dense_rewards, a.normalize_advantages, config.reward.reward_scale) == ("reinforce++", 0, True, False, 0)


def test_a_variant_for_one_gpu_is_small_and_keeps_the_optimizer() -> None:
    config, base = load("qwen2.5-1.5b-single-gpu").config, load("qwen2.5-1.5b-grpo-megatron").config
    sizes = (config.algorithm.group_size, config.data.rollout_batch_size, config.runner.seq_length, config.runner.max_steps)
    assert sizes == (2, 128, 2048, 10)
    assert (config.actor.optim, config.reward) == (base.actor.optim, base.reward)


def test_where_parts_have_gpus_of_their_own_they_work_at_the_same_time() -> None:
    config = load("qwen2.5-1.5b-grpo-megatron-pipeline").config
    validate(config)
    assert build_plan(config, nodes_of(config.cluster)).mode == "disaggregated" and config.algorithm.max_staleness > 0
