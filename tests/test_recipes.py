"""The recipes that ship: values as in the published ones (RLinf's YAMLs for AReaL-boba), and what a variant changes."""

from __future__ import annotations

import pytest

from rlinf.config.load import load, value_of

SHARED = {
    "cluster.num_nodes": 16, "cluster.num_gpus_per_node": 8, "runner.max_epochs": 5, "runner.save_interval": 50, "runner.seq_length": 28672,
    "runner.max_tokens_per_mbs": 28672, "data.rollout_batch_size": 512, "data.max_prompt_length": 1024, "data.seed": 1234,
    "algorithm.n_minibatches": 4, "algorithm.loss_agg_func": "token-mean", "algorithm.kl_beta": 0.0, "algorithm.ratio_clip_eps": 0.2,
    "algorithm.normalize_advantages": True, "algorithm.early_stop_imp_ratio": 5.0, "algorithm.sampling_params.max_new_tokens": 27648,
    "algorithm.sampling_params.temperature": 1.0, "rollout.max_running_requests": 64, "actor.model.precision": "fp16",
    "actor.model.sequence_parallel": True, "actor.model.pipeline_model_parallel_size": 1, "actor.model.recompute_granularity": "full",
    "actor.model.recompute_method": "block", "actor.model.recompute_num_layers": 20, "actor.optim.lr": 2e-5, "actor.optim.adam_beta2": 0.95,
    "actor.optim.adam_eps": 1e-5, "actor.optim.weight_decay": 0.05, "reward.reward_scale": 5.0, "actor.offload_weight": True,
    "actor.offload_grad": True, "actor.offload_optimizer": True, "rollout.offload": True,
}  # fmt: skip
OWN = {
    "qwen2.5-1.5b-grpo-megatron": {
        "algorithm.group_size": 16, "algorithm.recompute_logprobs": True, "algorithm.shuffle_rollout": False, "actor.optim.clip_grad": 0.8,
        "actor.optim.loss_scale": 65536.0, "actor.model.tensor_model_parallel_size": 2, "rollout.tensor_parallel_size": 1,
        "rollout.gpu_memory_utilization": 0.55,
    },
    "qwen2.5-7b-grpo-megatron": {
        "algorithm.group_size": 32, "algorithm.recompute_logprobs": False, "algorithm.shuffle_rollout": True, "actor.optim.clip_grad": 1.0,
        "actor.optim.loss_scale": None, "actor.optim.loss_scale_window": 5, "actor.model.tensor_model_parallel_size": 4,
        "rollout.tensor_parallel_size": 2, "rollout.gpu_memory_utilization": 0.65,
    },
}  # fmt: skip


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


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_has_the_published_values(name: str) -> None:
    config = load(name).config
    wanted = SHARED | OWN[name]
    assert {key: value_of(config, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "changed"),
    [("qwen2.5-1.5b-single-gpu",
      {"algorithm.group_size": 2, "data.rollout_batch_size": 128, "runner.seq_length": 2048, "runner.max_steps": 10}),
     ("qwen2.5-1.5b-grpo-megatron-pipeline", {"cluster.num_nodes": 8, "algorithm.normalize_advantages": False})],
)  # fmt: skip
def test_a_variant_changes_what_it_says_and_keeps_the_optimizer(name: str, changed: dict[str, object]) -> None:
    config, base = load(name).config, load("qwen2.5-1.5b-grpo-megatron").config
    assert {key: value_of(config, key) for key in changed} == changed
    assert (config.actor.optim, config.reward) == (base.actor.optim, base.reward)
