"""The bounds of single numbers of the configuration. What concerns several keys is in validate.py."""

from __future__ import annotations

from collections.abc import Iterator

from rlinf.config.benchmarks import BENCHMARKS
from rlinf.config.load import value_of
from rlinf.config.schema import Config

AT_LEAST: dict[str, float] = {
    "cluster.num_nodes": 1,
    "cluster.num_gpus_per_node": 1,
    "cluster.threads_per_worker": 0,
    "cluster.start_timeout": 1,
    "runner.max_epochs": 1,
    "runner.val_check_interval": -1,
    "runner.save_interval": -1,
    "runner.keep_checkpoints": 0,
    "runner.keep_groups": -1,
    "runner.phase_timeout": -1,
    "runner.max_restarts": 1,
    "runner.seq_length": 2,
    "data.max_prompt_length": 1,
    "data.rollout_batch_size": 1,
    "data.seed": 0,
    "algorithm.group_size": 1,
    "algorithm.n_minibatches": 1,
    "algorithm.update_epochs": 1,
    "algorithm.gamma": 0,
    "algorithm.kl_beta": 0,
    "algorithm.entropy_bonus": 0,
    "algorithm.importance_sampling_low": 0,
    "algorithm.num_update_sample_per_prompt": 1,
    "actor.optim.initial_loss_scale": 1,  # Megatron's scaler goes no lower
    "algorithm.max_staleness": 0,
    "rollout.over_provisioning": 0,
    "rollout.max_engine_restarts": 0,
    "rollout.stall_timeout": 0,
    "algorithm.dynamic_sampling_batch_size": 1,
    "algorithm.dynamic_sampling_max_batches": 1,
    "algorithm.sampling_params.top_k": 0,
    "algorithm.sampling_params.max_new_tokens": 1,
    "rollout.tensor_parallel_size": 1,
    "rollout.max_running_requests": 1,
    "rollout.seed": 0,
    "rollout.verify_weights_every": 0,
    "actor.model.tensor_model_parallel_size": 1,
    "actor.model.pipeline_model_parallel_size": 1,
    "actor.model.context_parallel_size": 1,
    "actor.lora.rank": 0,
    "actor.lora.seed": 0,
    "actor.optim.lr": 0,
    "actor.optim.min_lr": 0,
    "actor.optim.lr_decay_steps": 0,
    "actor.optim.lr_warmup_steps": 0,
    "actor.optim.adam_beta1": 0,
    "actor.optim.adam_beta2": 0,
    "actor.optim.weight_decay": 0,
    "actor.optim.clip_grad": 0,
    "actor.optim.loss_scale_window": 1,
    "critic.seed": 0,
    "critic.warmup_steps": 0,
    "reward.reward_scale": 0,
    "reward.num_processes": 1,
    "reward.format_reward": 0,
    "reward.overlong_buffer": 0,
    "reward.overlong_penalty": 0,
    "reward.exploration_penalty": 0,
    **{f"evaluation.{name}.{key}": 1 for name in BENCHMARKS for key in ("n", "max_tokens")},
    **{f"evaluation.{name}.{key}": 0 for name in BENCHMARKS for key in ("temperature", "top_k")},
    "validation.n": 1,
    "validation.temperature": 0,
    "validation.top_k": 0,
    "validation.max_new_tokens": 1,
    "sft.batch_size": 1,
    "sft.reweighting_burn_in": 0,
}
MORE_THAN: dict[str, float] = {
    "algorithm.ratio_clip_eps": 0,
    "algorithm.clip_ratio_low": 0,
    "algorithm.clip_ratio_high": 0,
    "algorithm.clip_ratio_c": 1,
    "algorithm.early_stop_imp_ratio": 1,
    "algorithm.importance_sampling_clip": 0,
    "algorithm.behav_imp_weight_cap": 0,
    "algorithm.gae_lambda": 0,
    "algorithm.sampling_params.temperature": 0,
    "algorithm.sampling_params.top_p": 0,
    "rollout.gpu_memory_utilization": 0,
    "actor.lora.alpha": 0,
    "actor.optim.adam_eps": 0,
    "actor.optim.loss_scale": 0,
    "critic.value_clip": 0,
    "runner.peak_tflops": 0,
    "token_reward.weight": 0,
    "reward.timeout": 0,
    **{f"evaluation.{name}.top_p": 0 for name in BENCHMARKS},
    "validation.top_p": 0,
    "sft.reweighting_temperature": 0,
}
LESS_THAN: dict[str, float] = {
    "rollout.gpu_memory_utilization": 1,
    "actor.optim.adam_beta1": 1,
    "actor.optim.adam_beta2": 1,
    "data.seed": 2**63,  # above it numpy no longer tells two seeds apart
}


for _table in (AT_LEAST, MORE_THAN, LESS_THAN):  # what the critic and the token reward model share with the actor has the actor's bounds
    _table |= {f"critic.{name.removeprefix('actor.')}": bound for name, bound in _table.items() if name.startswith("actor.")}
    _table |= {f"token_reward.{name.removeprefix('actor.')}": bound for name, bound in _table.items() if name.startswith("actor.model.")}


def out_of_bounds(c: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for every number that is outside of its bounds."""
    for key, least in AT_LEAST.items():
        value = value_of(c, key)
        if value is not None and value < least:
            yield key, f"must be at least {least}"
    for key, bound in MORE_THAN.items():
        value = value_of(c, key)
        if value is not None and value <= bound:
            yield key, f"must be greater than {bound}"
    for key, bound in LESS_THAN.items():
        if value_of(c, key) >= bound:
            yield key, f"must be less than {bound}"
