"""Keys and values that users of RLinf or verl may have in their files and that this project does not have: messages that say what to use
instead.

The first pattern that matches wins (shell wildcards).
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

_FROM_HF = "the architecture is read from config.json in rollout.model_dir; remove it"
_FIXED = "it is chosen by the code; remove it"
_DISTCKPT = "checkpoints in <run>/checkpoints always open in every layout (docs/checkpoints.md); remove it"
_NO_EFFECT = "it had no effect in the reference either; remove it"

KEYS: dict[str, str] = {
    "hydra*": "the configuration is loaded without hydra; remove the section",
    "defaults": "use `extends: other.yaml` at the top level to build on another file",
    # cluster, runner
    "cluster.auto_scheduler": "the schedule follows from cluster.component_placement; remove it",
    "cluster.use_*": "the schedule follows from cluster.component_placement; remove it",
    "cluster.node_groups*": "devices are numbered node by node; name them in cluster.component_placement",
    "cluster.tracer*": "step times are in metrics.jsonl under time/; remove it",
    "cluster.profiling*": "step times are in metrics.jsonl under time/; remove it",
    "runner.task_type": "there is one task type (reasoning); remove it",
    "runner.logger.log_path": "logs are written to runner.output_dir/runner.experiment_name; remove it",
    "runner.logger.experiment_name": "use runner.experiment_name",
    "runner.enable_dynamic_batch_size": "micro-batches are always packed up to runner.max_tokens_per_mbs tokens; remove it",
    "runner.per_worker_log*": "every worker always writes a log file; remove it",
    # algorithm
    "algorithm.training_batch_size_per_gpu": "micro-batches are packed by tokens; use runner.max_tokens_per_mbs",
    "algorithm.logprob_forward_micro_batch_size": "micro-batches are packed by tokens; use runner.max_tokens_per_mbs",
    "algorithm.rollout_batch_size_per_gpu": f"{_NO_EFFECT}; see data.rollout_batch_size and rollout.max_running_requests",
    "algorithm.val_rollout_batch_size_per_gpu": _NO_EFFECT,
    "algorithm.use_valid_token_scale": "token-mean is always the mean over all response tokens of the global mini-batch; remove it",
    "algorithm.calculate_entropy": "the entropy is always logged; remove it, or weight it with algorithm.entropy_bonus",
    "algorithm.combine_reference_model": "the reference policy always shares the actor's processes; remove it",
    "algorithm.use_reinpp_baseline": "use algorithm.adv_type: reinforce++-baseline",
    "algorithm.reinpp_kl_beta": "use algorithm.kl_beta with algorithm.kl_penalty_type and algorithm.kl_in: reward",
    "algorithm.clip_log_ratio_m*": "use algorithm.clip_ratio_low, clip_ratio_high and clip_ratio_c",
    "algorithm.len_reward_penalty": _NO_EFFECT,
    "algorithm.sampling_params.min_new_tokens": _NO_EFFECT,
    "algorithm.sampling_params.repetition_penalty": "it would make log-probabilities differ from those of the policy; remove it",
    "algorithm.sampling_params.use_greedy": "false is what do_sample: true, the default, says; remove it",
    "algorithm.max_num_gen_batches": "use algorithm.dynamic_sampling: true with algorithm.dynamic_sampling_max_batches",
    # rollout
    "rollout.model.model_path": "use rollout.model_dir",
    "rollout.model_path": "use rollout.model_dir",
    "rollout.model.precision": "use rollout.precision",
    "rollout.model.*": _FROM_HF,
    "rollout.model_arch": _FROM_HF,
    "rollout.pipeline_parallel_size": "an engine spans GPUs by rollout.tensor_parallel_size alone; remove it",
    "rollout.return_logprobs": "engines always report log-probabilities; algorithm.recompute_logprobs says which side is used",
    "rollout.validate_weight*": "weight syncs are always verified; rollout.verify_weights_every sets how often the engine is probed",
    "rollout.validate_save_dir": _NO_EFFECT,
    "rollout.print_outputs": "responses are written to <run>/samples; remove it",
    "rollout.detokenize": _FIXED,
    "rollout.padding": _NO_EFFECT,
    "rollout.eos": _NO_EFFECT,
    "rollout.distributed_executor_backend": _NO_EFFECT,
    "rollout.disable_log_stats": "engine counters are in metrics.jsonl; remove it",
    "rollout.enforce_eager": _FIXED,
    "rollout.attention_backend": "an option of SGLang; write rollout.sglang: {attention_backend: ...}",
    "rollout.use_torch_compile": "an option of SGLang; write rollout.sglang: {enable_torch_compile: true}",
    "rollout.torch_compile_max_bs": "an option of SGLang; write rollout.sglang: {torch_compile_max_bs: ...}",
    "rollout.sglang_decode_log_interval": "an option of SGLang; write rollout.sglang: {decode_log_interval: ...}",
    "rollout.cuda_graph_max_bs": "use rollout.max_running_requests",
    "rollout.vllm*": "vLLM is not an engine of this project; use rollout.rollout_backend: sglang",
    # data
    "data.type": "the format is the AReaL-boba JSONL format; remove it",
    "data.dataset_name": "the format is the AReaL-boba JSONL format; remove it",
    "data.val_rollout_batch_size": "validation always runs over all of data.val_data_paths; remove it",
    "data.validation_shuffle": "validation order does not matter; remove it",
    "data.num_workers": "data is read once at the start; remove it",
    "data.process_*": "data is read once at the start; remove it",
    # actor
    "actor.training_backend": "the backend is Megatron; remove it",
    "actor.mcore_gpt": _FIXED,
    "actor.spec_name": _FIXED,
    "actor.checkpoint_load_path": "use rollout.model_dir for the initial weights, runner.resume_dir for a checkpoint",
    "actor.enable_dp_load_balance": "micro-batches are always balanced over data-parallel ranks; remove it",
    "actor.calculate_flops": "throughput is always logged; remove it",
    "actor.seed": "use data.seed for the order of the data, rollout.seed for sampling",
    "actor.tokenizer*": "the tokenizer is read from rollout.model_dir; rollout.trust_remote_code replaces trust_remote_code",
    "actor.megatron.ckpt_convertor*": "Hugging Face weights are loaded directly from rollout.model_dir; remove it",
    "actor.megatron.*": _DISTCKPT,
    "actor.megatron": _DISTCKPT,
    "actor.model.megatron_checkpoint": "use runner.resume_dir",
    "actor.model.variable_seq_lengths": "sequences are always packed, whatever their lengths; remove it",
    "actor.model.*seq_length*": "use runner.seq_length",
    "actor.global_batch_size": "use data.rollout_batch_size x algorithm.group_size samples a step, in algorithm.n_minibatches",
    "actor.micro_batch_size": "micro-batches are packed by tokens; use runner.max_tokens_per_mbs",
    "actor.model.activation": _FROM_HF,
    "actor.model.normalization": _FROM_HF,
    "actor.model.position_embedding_type": _FROM_HF,
    "actor.model.add_bias_linear": _FROM_HF,
    "actor.model.*fusion": _FIXED,
    "actor.model.persist_layer_norm": _FIXED,
    "actor.model.attention_softmax_in_fp32": _FIXED,
    "actor.model.batch_p2p_comm": _FIXED,
    "actor.model.use_cpu_initialization": _FIXED,
    "actor.model.expert_*": "experts are divided among the tensor-parallel ranks; use actor.model.tensor_model_parallel_size",
    "actor.model.num_experts": _FROM_HF,
    "actor.model.num_moe_experts": _FROM_HF,
    "actor.model.moe_*": "experts and their number are the model's own, and there is no loss of load balance; remove it",
    "actor.optim.optimizer": "the optimizer is Adam with decoupled weight decay; remove it",
    "actor.optim.bf16": "use actor.model.precision: bf16",
    "actor.optim.fp16": "use actor.model.precision: fp16",
    "actor.optim.use_distributed_optimizer": "optimizer state is always sharded over data-parallel ranks; remove it",
    "actor.optim.overlap_*": _FIXED,
    "actor.optim.optimizer_enable_pin": _NO_EFFECT,
    "actor.optim.lr_warmup_fraction": "use actor.optim.lr_warmup_steps",
    "actor.lr_sched.lr_decay_style": "use actor.optim.lr_decay_style",
    "actor.lr_sched.lr_decay_iters": "use actor.optim.lr_decay_steps",
    "actor.lr_sched.lr_warmup_iters": "use actor.optim.lr_warmup_steps",
    "actor.lr_sched.lr_warmup_fraction": "use actor.optim.lr_warmup_steps",
    "actor.lr_sched.max_lr": "use actor.optim.lr",
    "actor.lr_sched.min_lr": "use actor.optim.min_lr",
    "actor.lr_sched*": "use actor.optim.{lr, min_lr, lr_decay_style, lr_decay_steps, lr_warmup_steps}",
    "*.group_name": "groups of workers are named after their component; remove it",
    # reward, critic, evaluation, inference
    "reward.len_reward_penalty": "use reward.overlong_buffer and its neighbours for answers that are too long",
    "reward.safe_length": "use reward.overlong_buffer and its neighbours for answers that are too long",
    "reward.use_reward_model": (
        "rewards come from the verifier of reward.reward_type; a model that scores responses is token_reward.model_dir"
    ),
    "reward.tokenizer*": "the tokenizer is read from rollout.model_dir; remove it",
    "critic.use_critic_model": "algorithm.adv_type: gae has a critic, no other has; remove it",
    "algorithm.value_clip": "use critic.value_clip",
    "evaluation.*.max_new_tokens": "in the section of a benchmark it is called max_tokens",
    "inference*": "the actor recomputes log-probabilities itself; remove the section and the component",
}
KEYS |= {
    name.replace("actor.", "critic.", 1): text.replace("actor.", "critic.") for name, text in KEYS.items() if name.startswith("actor.")
}

_VERL = "a name of verl; docs/migrating.md has the key that stands for it here"
KEYS |= {  # after those of RLinf
    "actor_rollout_ref*": _VERL,
    "trainer*": _VERL,
    "reward_model*": _VERL,
    "custom_reward_function*": "a name of verl; use reward.own_tasks, reward.own_parts or reward.own_group_parts (docs/extending.md)",
    "data.train_files": "use data.train_data_paths, with JSONL files",
    "data.val_files": "use data.val_data_paths, with JSONL files",
    "data.train_batch_size": "use data.rollout_batch_size: prompts per step",
    "data.max_response_length": "use algorithm.sampling_params.max_new_tokens",
    "data.filter_overlong_prompts": "use data.filter_prompt_by_length",
    "data.apply_chat_template_kwargs": "use data.chat_template_variables",
    "algorithm.adv_estimator": "use algorithm.adv_type",
    "algorithm.norm_adv_by_std_in_grpo": "true is adv_type: grpo, false is adv_type: dr_grpo",
    "algorithm.lam": "use algorithm.gae_lambda",
    "algorithm.use_kl_in_reward": "use algorithm.kl_in: reward with algorithm.kl_beta",
    "algorithm.kl_ctrl*": "use algorithm.kl_in: reward with algorithm.kl_beta, which is fixed",
    "algorithm.kl_penalty": "use algorithm.kl_penalty_type",
    "algorithm.filter_groups*": "use algorithm.dynamic_sampling: true with algorithm.dynamic_sampling_max_batches",
    "algorithm.rollout_correction*": "use algorithm.importance_sampling_fix: true with algorithm.importance_sampling_type and _clip",
    "critic.cliprange_value": "use critic.value_clip",
}

VALUES: dict[tuple[str, str], str] = {
    ("algorithm.loss_type", "actor"): "the reference's `actor` is `ppo` here",
    ("algorithm.loss_type", "grpo"): "GRPO is adv_type: grpo; its loss is `ppo` here",
    ("algorithm.kl_penalty_type", "low_var_kl"): "the reference's `low_var_kl` is `k3` here",
    ("algorithm.kl_penalty_type", "kl"): "the reference's `kl` is `k1` here",
    ("algorithm.kl_penalty_type", "mse"): "the reference's `mse` is `k2` here",
    ("algorithm.kl_penalty_type", "abs"): "use k2, which is symmetric too",
    ("algorithm.adv_type", "reinforce_plus_plus"): "verl's `reinforce_plus_plus` is `reinforce++` here",
    ("algorithm.adv_type", "reinforce_plus_plus_baseline"): "verl's `reinforce_plus_plus_baseline` is `reinforce++-baseline` here",
    ("algorithm.adv_type", "group_norm"): "OpenRLHF's `group_norm` is `grpo` here",
    ("algorithm.adv_type", "reinpp"): "the reference's `reinpp` is `reinforce++` here, and with use_reinpp_baseline `reinforce++-baseline`",
    ("rollout.rollout_backend", "vllm"): "vLLM is not an engine of this project; use sglang",
    ("actor.model.precision", "16"): "write fp16",
    ("actor.model.precision", "32"): "write fp32",
    ("actor.model.precision", "bf16-mixed"): "write bf16; master weights are fp32 always",
}  # fmt: skip


def dropped_key(name: str) -> str | None:
    """What to use instead of a key of RLinf or verl; None when it is not such a key."""
    return next((text for pattern, text in KEYS.items() if fnmatchcase(name, pattern)), None)


def dropped_value(name: str, value: Any) -> str | None:
    """What to use instead of a value that RLinf or verl has for a key that we have too; None when it is not such a value."""
    return VALUES.get((name, str(value)))
