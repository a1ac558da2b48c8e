"""Checks of a configuration before a run is started or planned: do its models fit, are its files there. And the size of a step, for
`--dry-run`.

planned: whether nothing is about to start, so that models and files may be on another machine: if they are not here, that is only a
warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlinf.config.model import load_model_config, missing_paths, planned_model_config, validate_model, validate_scorer
from rlinf.config.schema import Config
from rlinf.data.tokenizer import token_unknown_to
from rlinf.errors import UserError
from rlinf.hardware import has_gpu
from rlinf.rollout.sglang_server import find_interpreter
from rlinf.weights.architecture import read_architecture

ModelConfig = dict[str, Any]  # a model's config.json


def check_models(config: Config, planned: bool) -> tuple[ModelConfig | None, list[str]]:
    """Check the configuration against the shape of every model of the run. Returns (config.json of the actor's model, warnings).

    The first is None only with `planned`, when neither the model nor a known one of its name is here; then nothing is checked. Raises
    UserError for a model that cannot be used, or does not fit.
    """

    def read(model_dir: str, key: str) -> tuple[ModelConfig | None, list[str]]:
        return planned_model_config(model_dir, key) if planned else (load_model_config(model_dir, key), [])

    actor, warnings = read(config.rollout.model_dir, "rollout.model_dir")
    if actor:
        read_architecture(actor, Path(config.rollout.model_dir, "config.json"))
        validate_model(config, actor)
    for role in config.megatron_roles[1:]:  # besides the actor
        folder = config.model_dir_of(role)
        model, more = (actor, []) if folder == config.rollout.model_dir else read(folder, f"{role}.model_dir")
        warnings += more
        if actor and model:
            read_architecture(model, Path(folder, "config.json"))
            validate_scorer(config, role, model, actor)
            if config.head_of(role) == "lm" and Path(folder).is_dir() and Path(config.rollout.model_dir).is_dir():
                _check_tokens(config, folder)
    return actor, warnings


def _check_tokens(config: Config, teacher: str) -> None:
    """Raise UserError unless a teacher means the same by a token id as the policy: it is given the policy's ids."""
    if token := token_unknown_to(teacher, config.rollout.model_dir, config.rollout.trust_remote_code):
        raise UserError(
            f"token_reward.model_dir: {teacher} has another tokenizer than {config.rollout.model_dir}, which has the token {token[1]!r} as "
            f"{token[0]}; a teacher reads the policy's tokens: take one of the same family"
        )


def check_files(config: Config, planned: bool) -> list[str]:
    """A message for each file besides models that the run reads and that is missing. Raises one UserError with all of them, unless
    `planned`."""
    absent = missing_paths(config)
    if absent and not planned:
        raise UserError("\n  ".join(["files that the run needs are not there:", *absent]))
    return absent


def check_engine(config: Config, planned: bool) -> list[str]:
    """A message when SGLang is the engine and not installed. Raises it as UserError, unless `planned`.

    Only for a run on this machine alone: engines may run on other nodes, and each says the same when it starts.
    """
    if config.rollout.rollout_backend != "sglang" or config.cluster.num_nodes > 1:
        return []
    try:
        find_interpreter(config.rollout.sglang_python, config.cluster.device != "cpu" and has_gpu())
    except UserError as error:
        if not planned:
            raise
        return [str(error)]
    return []


def describe_step(config: Config) -> str:
    """The size of a step of `rlinf train`."""
    prompts, group, kept = config.data.rollout_batch_size, config.algorithm.group_size, config.algorithm.num_update_sample_per_prompt
    trained, n_minibatches, epochs = prompts * min(group, kept or group), config.algorithm.n_minibatches, config.algorithm.update_epochs
    some = f"{kept} of each prompt are trained on, " if kept and kept < group else ""
    return (
        f"step: {prompts} prompts x {group} responses = {prompts * group} samples, {some}"
        f"{f'{epochs} passes of ' if epochs > 1 else ''}{n_minibatches} optimizer step(s) of {trained // n_minibatches}"
    )


def describe_sft_step(config: Config) -> str:
    """The size of a step of `rlinf sft`."""
    return f"step: {config.sft.batch_size} examples, 1 optimizer step"
