"""Finds settings that would have no effect: a recipe given to the wrong command, words of the command line that the command does not read,
and keys that act only together with another one.

A file may hold settings for several commands; a word of the command line is meant for this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlinf.config.benchmarks import BENCHMARKS
from rlinf.config.keys import known_keys
from rlinf.config.load import DEFAULT, value_of
from rlinf.config.schema import Config
from rlinf.config.settings import COMMAND_LINE

PLACEMENT = "cluster.component_placement"
REMOVE, READ = "remove it", ""
TRAIN = {
    "sft": "it is of `rlinf sft`; remove it",
    "evaluation": "it is of `rlinf eval`; training validates on data.val_data_paths, as `validation` says",
}
SFT = {
    **dict.fromkeys(("algorithm", "critic", "token_reward", "reward", "validation", "evaluation", "data.tasks"), REMOVE),
    "rollout": REMOVE,
    "rollout.model_dir": READ,
    "rollout.trust_remote_code": READ,
    "data.rollout_batch_size": "set sft.batch_size",
    "data.max_prompt_length": "runner.seq_length bounds prompt + response",
    "data.answer_key": "set sft.response_key",
    **dict.fromkeys(("actor.offload_weight", "actor.offload_grad", "actor.offload_optimizer"), "no engine needs the memory; remove it"),
}
EVAL = {
    **dict.fromkeys(("critic", "token_reward", "sft", "runner", "validation", "data.rollout_batch_size"), REMOVE),
    "actor": REMOVE,
    "actor.model.precision": READ,
    "algorithm": "each benchmark has its own sampling, such as evaluation.custom.temperature",
    PLACEMENT: "engines take every device; remove it",
    "data.apply_chat_template": "set the template of a benchmark, such as evaluation.custom.template",
    "data.max_prompt_length": "only the model's own limit counts; remove it",
    "data.tasks": "all problems of a file are evaluated; remove it",
    **dict.fromkeys(("data.train_data_paths", "data.val_data_paths"), "set the path of a benchmark, such as evaluation.custom.path"),
    "runner.output_dir": "set evaluation.output_dir",
    "runner.seq_length": "set max_tokens of a benchmark, such as evaluation.custom.max_tokens",
}
UNREAD = {"train": TRAIN, "sft": SFT, "eval": EVAL}  # command -> key or section -> what to do; the longest name that fits counts


class OnlyWith(NamedTuple):
    """`key` has a meaning only while `acts` is true of the value of the key `switch`. wanted: what to set that one to."""

    key: str
    switch: str
    acts: Callable[[Any], bool]
    wanted: str


ONLY_WITH = (
    OnlyWith("runner.max_restarts", "runner.on_hang", lambda v: v == "restart", "restart"),
    OnlyWith("runner.profile_ranks", "runner.profile_steps", bool, "[a step]"),
    *(
        OnlyWith(f"runner.{name}", "runner.save_interval", bool, "-1, or more")
        for name in ("async_checkpoint", "keep_checkpoints", "keep_best")
    ),
    OnlyWith("algorithm.kl_penalty_type", "algorithm.kl_beta", bool, "more than 0"),
    OnlyWith("algorithm.behav_imp_weight_cap", "algorithm.loss_type", lambda v: v == "decoupled-ppo", "decoupled-ppo"),
    OnlyWith("algorithm.importance_sampling_clip", "algorithm.importance_sampling_fix", bool, "true"),
    OnlyWith("algorithm.dynamic_sampling_max_batches", "algorithm.dynamic_sampling", bool, "true"),
    OnlyWith("data.chat_template_variables", "data.apply_chat_template", bool, "true"),
    OnlyWith("rollout.sglang", "rollout.rollout_backend", lambda v: v == "sglang", "sglang"),
    OnlyWith("reward.overlong_penalty", "reward.overlong_buffer", bool, "more than 0"),
    *(
        OnlyWith(f"validation.{name}", switch, bool, wanted)
        for name in ("n", "temperature", "max_new_tokens")
        for switch, wanted in (("data.val_data_paths", "[a file]"), ("runner.val_check_interval", "-1, or more"))
    ),
    *(OnlyWith(f"validation.{name}", "validation.temperature", bool, "more than 0") for name in ("top_p", "top_k")),
    OnlyWith("sft.reweighting_temperature", "sft.reweighting", bool, "lin_upper, or another"),
    *(
        OnlyWith(f"{role}.optim.{name}", f"{role}.optim.lr_decay_style", lambda v: v != "constant", "linear or cosine")
        for role in ("actor", "critic")
        for name in ("min_lr", "lr_decay_steps")
    ),
    *(
        OnlyWith(f"{role}.lora.{name}", f"{role}.lora.rank", bool, "more than 0")
        for role in ("actor", "critic")
        for name in ("alpha", "target_modules", "seed")
    ),
    *(
        OnlyWith(f"evaluation.{name}.{key}", f"evaluation.{name}.temperature", bool, "more than 0")
        for name in BENCHMARKS
        for key in ("top_p", "top_k")
    ),
    *(OnlyWith(f"evaluation.{name}.instruction", f"evaluation.{name}.template", lambda v: v != "raw", "chat or r1") for name in BENCHMARKS),
)


def unread(command: str, provenance: Mapping[str, str], config: Config) -> Iterator[tuple[str, str]]:
    """(key, message) for every key that is set on the command line and that `rlinf COMMAND` does not read."""
    for name in (n for n, where in provenance.items() if where.partition(":")[0] == COMMAND_LINE):
        parts = name.split(".")
        prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        if remedy := next((UNREAD[command][p] for p in prefixes if p in UNREAD[command]), READ):
            yield name, f"`rlinf {command}` does not read it; {remedy}"
        if command == "eval" and parts[0] == "evaluation" and parts[1] in BENCHMARKS and getattr(config.evaluation, parts[1]).path is None:
            yield name, f"evaluation.{parts[1]} is not evaluated, since its path is null; set it, or remove this"


def without_effect(sections: Sequence[str], provenance: Mapping[str, str], config: Config) -> Iterator[tuple[str, str]]:
    """(key, message) for every key that is set while the key with which it acts is off.

    When the user has set that other key too, it may be off only for a while; then only keys on the command line count.
    """
    for name, switch, acts, wanted in ONLY_WITH:
        forgotten = provenance.get(switch) == DEFAULT or provenance.get(name) == COMMAND_LINE
        default, value = known_keys()[name].default, value_of(config, name)
        if name.partition(".")[0] in sections and value != default and forgotten and not acts(value_of(config, switch)):
            yield name, f"has a meaning only with {switch}: {wanted}; set that, or remove this"


def beyond(sections: Sequence[str], provenance: Mapping[str, str], config: Config) -> Iterator[tuple[str, str]]:
    """(key, message) for every key whose value lies beyond what another key leaves room for, so that it has no effect.

    Where only that other key is set on the command line, the run is a trial of a smaller size, and the files may keep their values.
    """
    for name, limit, why in _past_limits(config):
        trial = provenance.get(limit) == COMMAND_LINE and provenance.get(name) != COMMAND_LINE
        if name.partition(".")[0] in sections and not trial:
            yield name, f"has no effect: {why}; lower it, or remove it"


def _past_limits(config: Config) -> Iterator[tuple[str, str, str]]:
    """(key, the key that leaves no room for its value, why)."""
    max_steps, algorithm, max_restarts = config.runner.max_steps, config.algorithm, config.rollout.max_engine_restarts
    if any(step > max_steps > 0 for step in config.runner.profile_steps):
        yield "runner.profile_steps", "runner.max_steps", f"the run ends after step {max_steps} (runner.max_steps)"
    if (algorithm.num_update_sample_per_prompt or 0) > algorithm.group_size:
        why = f"a prompt has algorithm.group_size ({algorithm.group_size}) responses"
        yield "algorithm.num_update_sample_per_prompt", "algorithm.group_size", why
    default = known_keys()["rollout.max_engine_restarts"].default  # is no mistake: config.yaml of a run has all keys
    if config.cluster.backend == "local" and max_restarts not in (0, default):
        why = "an engine that shares its process with the driver (cluster.backend local) cannot be started anew"
        yield "rollout.max_engine_restarts", "cluster.backend", why


def recipe_for_sft(config: Config) -> Iterator[tuple[str, str]]:
    """(key, message) when `rlinf train` was given a recipe for `rlinf sft`."""
    if config.trains_alone:
        yield (
            PLACEMENT,
            (
                "places the actor alone, so this is a recipe for `rlinf sft`: run `rlinf sft` with it; `rlinf train` and "
                "`rlinf plan` need devices for rollout and reward too"
            ),
        )


def recipe_for_training(provenance: Mapping[str, str], config: Config) -> Iterator[tuple[str, str]]:
    """(key, message) when `rlinf sft` was given a recipe for `rlinf train`: engines are placed, and no file sets a key of the section
    `sft`."""
    others = [name for name in ("rollout", "reward") if name in config.placed]
    of_sft = any(name.startswith("sft.") and where not in (DEFAULT, COMMAND_LINE) for name, where in provenance.items())
    if "actor" in config.placed and others and provenance.get(PLACEMENT, DEFAULT) != DEFAULT and not of_sft:
        yield (
            PLACEMENT,
            (
                f"places {' and '.join(others)} too, so this is a recipe for `rlinf train`: run `rlinf train` with it; "
                f"to fine-tune with its model and data add {PLACEMENT}='{{actor: all}}'"
            ),
        )
