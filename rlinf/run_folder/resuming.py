"""Which checkpoints a run may be resumed from, and which settings have to stay as they were.

A checkpoint without groups that were generated ahead of training holds only a step and a place in the data, so any schedule and batch size
can go on from it. Groups that were generated ahead belong to batches of a certain size, were begun under a certain allowed staleness, and
have tokens and rewards that are not made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlinf.config.load import value_of
from rlinf.config.model import load_model_config
from rlinf.config.own_code import identified
from rlinf.config.schema import Config
from rlinf.errors import UserError
from rlinf.files import read_json
from rlinf.weights.adapters import refuse_other_adapters, trained_shapes
from rlinf.weights.architecture import read_architecture
from rlinf.weights.checkpoint_part import open_part

TRAIN, TRAIN_ONLY, SFT = "train", "train --debug-train-only", "sft"  # commands; checkpoints of the second hold no place in the data
MAY_GROW = ("algorithm.max_staleness", "algorithm.sampling_params.max_new_tokens")
SAMPLING = tuple(f"algorithm.sampling_params.{name}" for name in ("temperature", "top_k", "top_p", "stop"))
REWARD = tuple(
    f"reward.{name}"
    for name in (
        "reward_type", "own_tasks", "own_parts", "own_group_parts", "reward_scale", "undecided_reward", "answer_format", "format_reward",
        "four_levels", "overlong_buffer", "overlong_penalty", "exploration_penalty",
    )
)  # fmt: skip
BINDING = ("algorithm.schedule", "algorithm.group_size", "data.rollout_batch_size", *MAY_GROW, *SAMPLING, *REWARD)


def made_with(config: Config) -> dict[str, Any]:
    """The settings that groups generated ahead depend on, as run_state.json records them; of own functions what they are, not where."""
    values = {key: value_of(config, key) for key in BINDING}
    return {key: identified(value) if isinstance(value, dict) else value for key, value in values.items()}


def groups_ahead(state: Mapping[str, Any]) -> int:
    """How many groups of a checkpoint were begun and not yet trained on."""
    schedule = state.get("schedule", {})
    if "ledger" in schedule:
        return len(schedule["ledger"]["groups"])
    return sum(len(batch["scored"]) for batch in schedule.get("waiting", ()))


def regenerated_groups(state: Mapping[str, Any]) -> dict[int, set[str]]:
    """Groups of a checkpoint whose samples and journal the resumed run writes again, by the step that they were begun for: it writes them
    when it judges them or, if they were done, when it reads them. With the logical schedule there are none: all belong to later steps."""
    found: dict[int, set[str]] = {}
    for name, _, step in state.get("schedule", {}).get("wanted", ()):
        found.setdefault(step, set()).add(name)
    return found


def refuse_other_model(step_dir: Path, command: str, config: Config) -> None:
    """Raise UserError when the weights of the checkpoint do not fit the models of this configuration."""
    for role in ("actor", "critic") if config.has_critic and command != SFT else ("actor",):
        key, model_dir = "rollout.model_dir" if role == "actor" else f"{role}.model_dir", config.model_dir_of(role)
        if role == "critic" and not (step_dir / role).is_dir():
            raise UserError(
                f"runner.resume_dir: {step_dir} was made without a critic, and algorithm.adv_type gae has one. Put adv_type back, or start "
                f"a new run from the weights: rollout.model_dir={step_dir / 'hf'}"
            )
        part, lora = step_dir / role, getattr(config, role).lora
        refuse_other_adapters(part, read_json(part / "state.json"), lora, role)
        stored = open_part(part)["param"]
        arch = read_architecture(load_model_config(model_dir, key), f"{model_dir}/config.json")
        expected = trained_shapes(arch, lora, config.head_of(role))
        for name in sorted(stored.keys() | expected.keys()):
            found, wanted = stored.shape(name) if name in stored else "not there", expected.get(name, "not there")
            if found != wanted:
                raise UserError(
                    f"runner.resume_dir: {step_dir} was made of another model: tensor {name} is {found} in it, and {wanted} in {key} "
                    f"{model_dir}. Put that back; to begin with other weights set their folder in a new run"
                )


def refuse_changes(step_dir: Path, state: Mapping[str, Any], command: str, config: Config) -> None:
    """Raise UserError when `command` with this configuration cannot resume from the checkpoint."""
    start = f"rollout.model_dir={step_dir / 'hf'}"
    made_by = TRAIN_ONLY if state.get("sampler") == {} else state["command"]  # older checkpoints call both `train`
    if command != made_by and (command, made_by) != (TRAIN_ONLY, TRAIN):
        raise UserError(
            f"runner.resume_dir: {step_dir} is a checkpoint of `rlinf {made_by}`, and this is `rlinf {command}`; "
            f"to start from its weights set {start}, in a new run"
        )
    sampler = state.get("sampler", {})
    for name in ("seed", "shuffle"):
        if name in sampler and sampler[name] != (own := value_of(config, f"data.{name}")):
            raise UserError(
                f"cannot resume: {step_dir} was made with data.{name} {sampler[name]!r}, this run has {own!r}. "
                f"Put it back, or start a new run from the weights: {start}"
            )
    if command == TRAIN and groups_ahead(state):
        older = {"algorithm.schedule": "wallclock" if "ledger" in state["schedule"] else "logical"}  # that told nothing more
        then, now = state.get("made_with", older), made_with(config)
        changed = [
            f"{key}: {value!r} instead of {now[key]!r}"
            for key, value in then.items()
            if (now[key] < value if key in MAY_GROW else now[key] != value)
        ]
        if changed:
            raise UserError(
                f"runner.resume_dir: {step_dir} holds {groups_ahead(state)} groups that were generated ahead, with {', '.join(changed)}, "
                f"and they do not fit this run. Put it back ({' and '.join(MAY_GROW)} may grow), "
                f"or start a new run from the weights: {start}"
            )
