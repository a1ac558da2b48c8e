"""The bounds of numbers, which stand with the keys, and rules that concern several keys. It reads nothing but the configuration and starts
nothing; all violations are reported at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from rlinf.config.benchmarks import BENCHMARKS
from rlinf.config.keys import known_keys
from rlinf.config.load import value_of
from rlinf.config.own_code import is_own
from rlinf.config.schema import Config, RewardConfig
from rlinf.config.unread import beyond, recipe_for_sft, recipe_for_training, unread, without_effect
from rlinf.config.values import dump
from rlinf.errors import UserError

Violation = tuple[str, str]  # key, what is wrong with it and what to do

SGLANG_STOP_STRINGS = 32  # MAX_STOP_COUNT of its sampling parameters
SET_BY_US: dict[str, str] = {  # options of the SGLang server
    "model_path": "rollout.model_dir", "model": "rollout.model_dir", "tokenizer_path": "rollout.model_dir",
    "trust_remote_code": "rollout.trust_remote_code", "dtype": "rollout.precision", "device": "cluster.device",
    "tp_size": "rollout.tensor_parallel_size", "tensor_parallel_size": "rollout.tensor_parallel_size",
    "mem_fraction_static": "rollout.gpu_memory_utilization", "max_running_requests": "rollout.max_running_requests",
    "context_length": "runner.seq_length", "random_seed": "rollout.seed",
} | dict.fromkeys(
    ("config", "host", "port", "api_key", "admin_api_key", "weight_version", "incremental_streaming_output", "sampling_defaults",
     "skip_tokenizer_init", "dp_size", "data_parallel_size", "pp_size", "pipeline_parallel_size", "nnodes", "node_rank",
     "dist_init_addr"),
    "the engine",
)  # fmt: skip


def validate(config: Config, provenance: Mapping[str, str] | None = None) -> None:
    """Raise one UserError that lists every violation, each with the key, its value and (given the provenance) who set it."""
    _raise(config, provenance, (recipe_for_sft,))  # alone: the rest follows from it
    objective = (_algorithm, _kl, _importance, _selection, _sampling)
    models = (_actor, _critic, _token_reward)
    rules = (_bounds, _cluster, _runner, _validation, _lengths, _data, *objective, _rollout, *models, _reward)
    sections = ("runner", "data", "algorithm", "rollout", "actor", "reward", "validation", *(["critic"] if config.has_critic else []))
    dead = (
        partial(unread, "train", provenance or {}),
        partial(without_effect, sections, provenance or {}),
        partial(beyond, sections, provenance or {}),
    )
    _raise(config, provenance, (*rules, *dead))


def validate_evaluation(config: Config, provenance: Mapping[str, str] | None = None) -> None:
    """Like validate, with the rules for an evaluation."""
    sections = ("rollout", "evaluation")
    dead = (
        partial(unread, "eval", provenance or {}),
        partial(without_effect, sections, provenance or {}),
        partial(beyond, sections, provenance or {}),
    )
    _raise(config, provenance, (_bounds, _cluster, _rollout, _reward, _evaluation, *dead))


def validate_sft(config: Config, provenance: Mapping[str, str] | None = None) -> None:
    """Like validate, with the rules for supervised fine-tuning."""
    _raise(config, provenance, (partial(recipe_for_training, provenance or {}),))
    dead = (partial(unread, "sft", provenance or {}), partial(without_effect, ("runner", "data", "actor", "sft"), provenance or {}))
    _raise(config, provenance, (_bounds, _cluster, _runner, _data, _actor, _sft, *dead))


def validate_judging(config: Config, provenance: Mapping[str, str] | None = None) -> None:
    """Like validate, with the rules for judging answers that are there already."""
    _raise(config, provenance, (_bounds, _reward))


def _raise(config: Config, provenance: Mapping[str, str] | None, rules: Sequence[Callable[[Config], Iterator[Violation]]]) -> None:
    found = [v for rule in rules for v in rule(config)]
    if found:
        where = provenance or {}
        lines = [f"  {key} = {dump(value_of(config, key))}{f' ({where[key]})' if key in where else ''}: {text}" for key, text in found]
        raise UserError("this configuration cannot be run:\n" + "\n".join(lines))


def _bounds(c: Config) -> Iterator[Violation]:
    for name, key in known_keys().items():
        value = value_of(c, name)
        if key.kind in (int, float) and value is not None and (wrong := key.out_of_bounds(value)):
            yield name, wrong


def _cluster(c: Config) -> Iterator[Violation]:
    if c.cluster.backend == "local" and c.cluster.num_nodes > 1:
        yield "cluster.backend", "local runs everything in one process; use ray for more than one node"


def _runner(c: Config) -> Iterator[Violation]:
    name, resume = c.runner.experiment_name, c.runner.resume_dir
    if not name or name in (".", "..") or "/" in name:
        yield "runner.experiment_name", "names one folder inside runner.output_dir; it cannot be empty or contain `/`"
    if not c.runner.output_dir:
        yield "runner.output_dir", "is empty; name a folder, such as ./logs"
    if c.runner.max_steps != -1 and c.runner.max_steps < 1:
        yield "runner.max_steps", "must be at least 1, or -1 for no limit but max_epochs"
    if resume not in (None, "auto") and not re.fullmatch(r"(.*/)?step_[^/]*|.+/(latest|best)", resume.rstrip("/")):
        yield (
            "runner.resume_dir",
            "must be null, auto, or the path of a step_* folder, or of latest or best beside it, such as "
            "logs/my-run/checkpoints/step_000050",
        )
    if c.runner.on_hang == "restart" and c.cluster.backend == "local":
        yield "runner.on_hang", "restart ends the workers' processes, and cluster.backend local has none; use abort, or cluster.backend ray"
    if c.runner.max_tokens_per_mbs < c.runner.seq_length:
        yield (
            "runner.max_tokens_per_mbs",
            f"must be at least runner.seq_length ({c.runner.seq_length}), or the longest sample fits no micro-batch",
        )
    if c.runner.val_check_interval > 0 and not c.data.val_data_paths:
        yield "runner.val_check_interval", "asks for validation, but data.val_data_paths is empty; name a file, or set it to 0"


def _validation(c: Config) -> Iterator[Violation]:
    yield from _answers(c, "validation")
    v, room = c.validation, c.runner.seq_length - c.data.max_prompt_length
    if v.max_new_tokens is not None and v.max_new_tokens > room:
        yield (
            "validation.max_new_tokens",
            f"a prompt of data.max_prompt_length ({c.data.max_prompt_length}) leaves room for {room} tokens in runner.seq_length "
            f"({c.runner.seq_length}); lower it, or raise runner.seq_length",
        )


def _lengths(c: Config) -> Iterator[Violation]:
    longest = c.data.max_prompt_length + c.algorithm.sampling_params.max_new_tokens
    if longest > c.runner.seq_length:
        yield (
            "runner.seq_length",
            (
                f"must hold data.max_prompt_length ({c.data.max_prompt_length}) + algorithm.sampling_params.max_new_tokens "
                f"({c.algorithm.sampling_params.max_new_tokens}) = {longest} tokens"
            ),
        )


def _data(c: Config) -> Iterator[Violation]:
    if not c.data.train_data_paths:
        yield "data.train_data_paths", "is empty; name at least one JSONL file"
    for key in ("data.prompt_key", "data.answer_key"):
        if not value_of(c, key):
            yield key, "is empty; name a field of the records"
    if c.data.tasks == []:
        yield "data.tasks", "keeps no task at all; write null to keep all"


def _algorithm(c: Config) -> Iterator[Violation]:
    a = c.algorithm
    trained = min(a.group_size, a.num_update_sample_per_prompt or a.group_size)
    batch = c.data.rollout_batch_size * trained
    if a.group_size == 1 and a.adv_type not in ("reinforce++", "gae") and not is_own(a.adv_type):
        yield (
            "algorithm.group_size",
            f"adv_type {a.adv_type} compares the responses of one prompt, so every advantage would be 0; use at least 2",
        )
    if a.n_minibatches > 0 and batch % a.n_minibatches:
        yield (
            "algorithm.n_minibatches",
            f"does not divide the global batch of {batch} samples (data.rollout_batch_size {c.data.rollout_batch_size} x "
            f"{f'algorithm.group_size {trained}' if trained == a.group_size else f'algorithm.num_update_sample_per_prompt {trained}'}); "
            f"the nearest that does is {_nearest_divisor(batch, a.n_minibatches)}",
        )
    if a.clip_ratio_c is not None and a.loss_type not in ("ppo", "decoupled-ppo") and not is_own(a.loss_type):
        yield "algorithm.clip_ratio_c", f"the dual clip belongs to loss_type ppo and decoupled-ppo, not {a.loss_type}; set it to null"
    if None not in (a.clip_ratio_low, a.clip_ratio_high) and a.ratio_clip_eps != known_keys()["algorithm.ratio_clip_eps"].default:
        yield "algorithm.ratio_clip_eps", "acts only where algorithm.clip_ratio_low or clip_ratio_high is null; remove it, or those"
    if a.gamma == 0 and not a.dense_rewards:
        yield "algorithm.gamma", "0 leaves a verdict to the last token alone; it is for algorithm.dense_rewards: true"


def _kl(c: Config) -> Iterator[Violation]:
    a = c.algorithm
    if a.kl_in == "reward" and a.kl_beta == 0:
        yield "algorithm.kl_in", "there is no KL term to take from the reward; set algorithm.kl_beta, or kl_in: loss"
    if a.token_level and a.normalize_advantages and a.num_update_sample_per_prompt is not None:
        yield (
            "algorithm.num_update_sample_per_prompt",
            "whitening needs the advantages of all responses, and where they differ from token to token (algorithm.adv_type gae, "
            "kl_in: reward, gamma < 1, dense_rewards) only those of the trained ones are known; "
            "set algorithm.normalize_advantages: false, or num_update_sample_per_prompt: null",
        )


def _importance(c: Config) -> Iterator[Violation]:
    a = c.algorithm
    fix, mask = a.importance_sampling_fix, a.importance_sampling_type in ("token-mask", "sequence-mask", "geometric-mask")
    if fix and not a.recompute_logprobs:
        yield "algorithm.importance_sampling_fix", "needs the actor's log-probabilities; set algorithm.recompute_logprobs: true"
    if a.loss_type == "decoupled-ppo":
        if fix:
            yield "algorithm.importance_sampling_fix", "decoupled-ppo weighs actor over engine already, and twice is wrong; set it to false"
        if a.importance_sampling_normalize and not a.recompute_logprobs:
            yield (
                "algorithm.importance_sampling_normalize",
                "needs the weights of the whole batch before its first update, and with algorithm.recompute_logprobs: false π_prox, and so "
                "the weights, follow the policy from update to update; set recompute_logprobs: true, or this to false",
            )
    if not fix:
        decoupled = a.loss_type == "decoupled-ppo"  # has the weights, with the bound of behav_imp_weight_cap
        for name, default in (("type", "token-truncate"), ("low", None), *([] if decoupled else [("normalize", False)])):
            if getattr(a, f"importance_sampling_{name}") != default:
                yield f"algorithm.importance_sampling_{name}", "has a meaning only with algorithm.importance_sampling_fix: true"
    if fix and a.importance_sampling_low is not None and not mask:
        yield (
            "algorithm.importance_sampling_low",
            f"importance_sampling_type {a.importance_sampling_type} has no lower bound; set it to null",
        )
    if fix and mask and a.importance_sampling_low is None and a.importance_sampling_clip < 1:
        yield (
            "algorithm.importance_sampling_clip",
            "is below 1, so that 1 / importance_sampling_clip is no lower bound; set importance_sampling_low",
        )
    if fix and mask and a.importance_sampling_low is not None and a.importance_sampling_low > a.importance_sampling_clip:
        yield "algorithm.importance_sampling_low", f"must be at most algorithm.importance_sampling_clip ({a.importance_sampling_clip})"


def _selection(c: Config) -> Iterator[Violation]:
    a, rollout = c.algorithm, c.rollout
    for name, value in (("rollout.partial", rollout.partial), ("rollout.over_provisioning", rollout.over_provisioning)):
        if value and a.schedule != "wallclock":
            yield name, "has a meaning only with algorithm.schedule: wallclock"
    if 0 < rollout.over_provisioning < 1:
        yield "rollout.over_provisioning", f"{rollout.over_provisioning:g} batches are less than a step needs; use 1 or more, or 0"
    if rollout.partial and a.max_staleness == 0:
        yield "rollout.partial", "carries nothing over while algorithm.max_staleness is 0; use 1 or more"
    if a.dynamic_sampling and a.group_size == 1:
        yield "algorithm.dynamic_sampling", "a group of one response is never both right and wrong; use algorithm.group_size of at least 2"
    if a.dynamic_sampling_batch_size is not None and not a.dynamic_sampling:
        yield "algorithm.dynamic_sampling_batch_size", "has a meaning only with algorithm.dynamic_sampling: true; set it to null"
    elif a.dynamic_sampling_batch_size is not None and a.schedule == "wallclock":
        yield (
            "algorithm.dynamic_sampling_batch_size",
            "has a meaning only with algorithm.schedule: logical; wallclock begins a group for each that taught nothing; set it to null",
        )


def _sampling(c: Config) -> Iterator[Violation]:
    sampling = c.algorithm.sampling_params
    if not sampling.do_sample:
        yield (
            "algorithm.sampling_params.do_sample",
            "greedy responses of one prompt are all equal, so there is nothing to compare; set it to true",
        )
    yield from _stop_strings(c, "algorithm.sampling_params.stop")


def _rollout(c: Config) -> Iterator[Violation]:
    backend = c.rollout.rollout_backend
    if backend == "embedded" and c.rollout.tensor_parallel_size > 1:
        yield "rollout.tensor_parallel_size", "the embedded engine runs on one device; set it to 1, or use rollout.rollout_backend: sglang"
    if c.rollout.offload and c.algorithm.max_staleness and not c.rollout.partial:
        yield (
            "rollout.offload",
            "engines that generate while the actor trains (algorithm.max_staleness) need their memory; "
            "set rollout.partial too, or set it to false",
        )
    if c.rollout.stall_timeout and c.cluster.backend == "local":
        yield "rollout.stall_timeout", "an engine that shares its process with the driver cannot be ended; set it to 0"
    if c.rollout.weight_transport == "broadcast":
        if c.cluster.backend == "local":
            yield "rollout.weight_transport", "broadcast needs a process for each rank, and cluster.backend: local has one; use auto"
        if c.rollout.max_engine_restarts:
            yield (
                "rollout.weight_transport",
                "an engine that is started anew is in no process group: set rollout.max_engine_restarts to 0 "
                "(the death of an engine then ends the run), or use auto or disk",
            )
    if c.rollout.weight_transport == "device_ipc" and c.engine_restarts:
        yield (
            "rollout.weight_transport",
            (
                "device_ipc keeps no weights on the device for an engine that is started anew: set rollout.max_engine_restarts "
                "to 0 (the death of an engine then ends the run), or use auto or disk"
            ),
        )
    for name in c.rollout.sglang:
        if name in SET_BY_US:
            yield "rollout.sglang", f"{name} is set by {SET_BY_US[name]}; remove it"
        elif not name.replace("_", "").isalnum() or name != name.lower():
            yield (
                "rollout.sglang",
                f"{name!r} is no name of an option; write it as SGLang's command line does, with underscores and no dashes",
            )


def _actor(c: Config) -> Iterator[Violation]:
    yield from _megatron(c, "actor")


def _megatron(c: Config, role: str) -> Iterator[Violation]:
    yield from _layout(c, role)
    optim, lora = getattr(c, role).optim, getattr(c, role).lora
    if lora.rank and not lora.target_modules:
        yield f"{role}.lora.target_modules", "names no matrix, so nothing would be trained; name some, or set lora.rank to 0"
    if optim.lr_decay_style != "constant":
        if optim.lr_decay_steps <= optim.lr_warmup_steps:
            yield (
                f"{role}.optim.lr_decay_steps",
                f"lr_decay_style {optim.lr_decay_style} needs more steps than lr_warmup_steps ({optim.lr_warmup_steps})",
            )
        if optim.min_lr > optim.lr:
            yield f"{role}.optim.min_lr", f"must be at most {role}.optim.lr ({optim.lr})"


def _layout(c: Config, role: str) -> Iterator[Violation]:
    model = getattr(c, role).model
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        yield f"{role}.model.sequence_parallel", f"needs {role}.model.tensor_model_parallel_size > 1; set it to false"
    if model.transformer_impl == "transformer_engine" and c.cluster.device == "cpu":
        yield f"{role}.model.transformer_impl", "Transformer Engine computes on a GPU alone, but cluster.device is cpu; use auto or local"
    if model.recompute_granularity == "full":
        if model.recompute_method is None:
            yield f"{role}.model.recompute_method", "recompute_granularity full needs a method: block or uniform"
        if model.recompute_num_layers is None or model.recompute_num_layers < 1:
            yield f"{role}.model.recompute_num_layers", "recompute_granularity full needs the number of layers, at least 1"
    else:
        for key in (f"{role}.model.recompute_method", f"{role}.model.recompute_num_layers"):
            if value_of(c, key) is not None:
                yield key, f"has a meaning only with {role}.model.recompute_granularity: full; set it to null"


def _critic(c: Config) -> Iterator[Violation]:
    a, placed = c.algorithm, "critic" in c.placed
    if a.adv_type != "gae":
        if placed:
            yield (
                "cluster.component_placement",
                f"places a critic, but adv_type {a.adv_type} has none; remove it, or set algorithm.adv_type: gae",
            )
        for name in (n for n, key in known_keys().items() if n.startswith("critic.") and value_of(c, n) != key.default):
            yield name, f"there is no critic with adv_type {a.adv_type}; remove it, or set algorithm.adv_type: gae"
        if a.gae_lambda != 1:
            yield "algorithm.gae_lambda", "has a meaning only with algorithm.adv_type: gae; set it to 1"
        return
    if not placed:
        yield (
            "algorithm.adv_type",
            "gae needs a critic; give it devices in cluster.component_placement, such as `actor,critic,rollout,reward: all`",
        )
    yield from _megatron(c, "critic")
    if 0 < c.runner.max_steps <= c.critic.warmup_steps:
        yield "critic.warmup_steps", f"leaves no step for the actor; it must be less than runner.max_steps ({c.runner.max_steps})"


def _token_reward(c: Config) -> Iterator[Violation]:
    a, placed = c.algorithm, "token_reward" in c.placed
    if not c.has_token_reward:
        if placed:
            yield (
                "cluster.component_placement",
                "places a token_reward, but token_reward.model_dir names no model; set it, or remove the component",
            )
        for name in (n for n, key in known_keys().items() if n.startswith("token_reward.") and value_of(c, n) != key.default):
            yield name, "there is no token reward model; set token_reward.model_dir, or remove this"
        if a.dense_rewards:
            yield "algorithm.dense_rewards", "needs the scores of a token reward model; set token_reward.model_dir, or this to false"
        return
    if not placed:
        yield (
            "token_reward.model_dir",
            "the model has no devices; give it some in cluster.component_placement, such as `actor,token_reward,rollout,reward: all`",
        )
    yield from _layout(c, "token_reward")
    if c.token_reward.model.recompute_granularity is not None:
        yield "token_reward.model.recompute_granularity", "a frozen model keeps no activations to recompute; set it to null"
    if a.dense_rewards and a.adv_type not in ("gae", "reinforce++"):
        yield "algorithm.dense_rewards", f"adv_type {a.adv_type} compares whole responses; use gae or reinforce++, or set it to false"


def _reward(c: Config) -> Iterator[Violation]:
    yield from _own_functions(c.reward)
    if not c.reward.reward_scale and not c.reward.own_parts and not c.reward.own_group_parts and not c.has_token_reward:
        yield (
            "reward.reward_scale",
            "every response would have the reward 0; set it above 0, or name a function in reward.own_parts or reward.own_group_parts, "
            "or a model in token_reward",
        )
    if c.reward.four_levels and c.reward.format_reward:
        yield "reward.format_reward", "reward.four_levels pays for the format already; set one of the two to 0 or false"
    if c.reward.four_levels and c.reward.undecided_reward is not None:
        yield (
            "reward.undecided_reward",
            "reward.four_levels has no level of its own for an undecided answer, it counts as wrong; set it to null",
        )
    limit = c.algorithm.sampling_params.max_new_tokens
    if c.reward.overlong_buffer > limit:
        yield "reward.overlong_buffer", f"must be at most algorithm.sampling_params.max_new_tokens ({limit})"


def _own_functions(reward: RewardConfig) -> Iterator[Violation]:
    for name in ("own_tasks", "own_parts", "own_group_parts"):
        for served, function in getattr(reward, name).items():
            if not is_own(function):
                yield f"reward.{name}", f"{served}: {function} names no function; write path/to/file.py:function"
            if name != "own_tasks" and not re.fullmatch(r"[A-Za-z0-9_.-]+", served):
                yield (
                    f"reward.{name}",
                    f"{served!r} is to name a curve, rollout/reward_own/<name>; give it a name of letters, digits, `_`, `.`, `-`",
                )
    for part in sorted(reward.own_parts.keys() & reward.own_group_parts.keys()):
        yield "reward.own_group_parts", f"{part} is a part of reward.own_parts already; give one of the two another name"
    if reward.own_timeout is not None and not (reward.own_tasks or reward.own_parts or reward.own_group_parts):
        yield "reward.own_timeout", "has a meaning only with reward.own_tasks, own_parts or own_group_parts; set it to null"


def _evaluation(c: Config) -> Iterator[Violation]:
    if all(getattr(c.evaluation, name).path is None for name in BENCHMARKS):
        paths = ", ".join(f"evaluation.{name}.path" for name in BENCHMARKS)
        yield "evaluation.custom.path", f"no problems are given; set the path of a benchmark: {paths}"
    if not c.evaluation.output_dir:
        yield "evaluation.output_dir", "is empty; name a folder, such as ./logs/eval"
    for name in BENCHMARKS:
        yield from _answers(c, f"evaluation.{name}")
        yield from _stop_strings(c, f"evaluation.{name}.stop")


def _answers(c: Config, section: str) -> Iterator[Violation]:
    """How problems are answered for a score: `validation`, or one of `evaluation`."""
    how = value_of(c, section)
    if how.temperature == 0 and how.n > 1:
        yield f"{section}.n", f"greedy answers of one problem are all equal ({section}.temperature is 0); set n to 1, or raise it"


def _stop_strings(c: Config, key: str) -> Iterator[Violation]:
    strings = value_of(c, key)
    if "" in strings:
        yield key, "an empty string would end every response at once; remove it"
    if c.rollout.rollout_backend == "sglang" and len(strings) > SGLANG_STOP_STRINGS:
        yield key, f"has {len(strings)} strings; SGLang takes {SGLANG_STOP_STRINGS} at most"


def _sft(c: Config) -> Iterator[Violation]:
    if not c.sft.response_key:
        yield "sft.response_key", "is empty; name a field of the records"
    if c.sft.reweighting is None and c.sft.reweighting_burn_in:
        yield "sft.reweighting_burn_in", "has a meaning only with sft.reweighting; set it to 0"


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
