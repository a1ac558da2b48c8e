"""A command refuses the recipe of another one, and words of the command line that it would not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf.config.keys import known_keys, known_sections
from rlinf.config.load import load
from rlinf.config.unread import ONLY_WITH, UNREAD, OnlyWith
from rlinf.config.validate import validate, validate_evaluation, validate_sft
from rlinf.errors import UserError

VALIDATE = {"train": validate, "sft": validate_sft, "eval": validate_evaluation}
SFT, GRPO = "smollm2-135m-sft-cpu", "smollm2-135m-grpo-cpu"
UNVALIDATED = "qwen2.5-1.5b-grpo-megatron"  # names no validation data
VALIDATES = "data.val_data_paths=[x] runner.val_check_interval=-1"
EVAL = ["evaluation.custom.path=/p.jsonl"]


def check(command: str, config: str, *words: str) -> None:
    resolved = load(config, words)
    VALIDATE[command](resolved.config, resolved.provenance)


@pytest.mark.parametrize(
    ("command", "config", "expected"),
    [
        ("train", SFT, "places the actor alone, so this is a recipe for `rlinf sft`: run `rlinf sft` with it"),
        ("sft", GRPO, "places rollout and reward too, so this is a recipe for `rlinf train`: run `rlinf train` with it"),
        ("sft", "smollm2-135m-ppo-cpu", "a recipe for `rlinf train`"),
    ],
)
def test_a_recipe_for_another_command_is_told_in_one_sentence(command: str, config: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        check(command, config)
    assert expected in str(error.value) and f"{config}.yaml:" in str(error.value) and str(error.value).count("\n") == 1


def test_a_recipe_for_training_is_fine_tuned_with_when_the_actor_is_placed_alone_or_a_file_has_the_section(tmp_path: Path) -> None:
    check("sft", GRPO, "cluster.component_placement={actor: all}")
    for text in (f"extends: {GRPO}\nsft: {{batch_size: 4}}\n", "data: {train_data_paths: [a]}\nrollout: {model_dir: /m}\n"):
        (tmp_path / "a.yaml").write_text(text)
        check("sft", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("command", "words", "key", "remedy"),
    [
        ("sft", ["algorithm.sampling_params.temperature=0.5"], "algorithm.sampling_params.temperature = 0.5", "remove it"),
        ("sft", ["rollout.rollout_backend=embedded"], "rollout.rollout_backend = embedded", "remove it"),
        ("sft", ["data.rollout_batch_size=8"], "data.rollout_batch_size = 8", "set sft.batch_size"),
        ("sft", ["data.max_prompt_length=8"], "data.max_prompt_length = 8", "runner.seq_length bounds prompt + response"),
        ("sft", ["data.answer_key=a"], "data.answer_key = a", "set sft.response_key"),
        ("sft", ["actor.offload_grad=false"], "actor.offload_grad = false", "no engine needs the memory"),
        ("sft", ["rollout.precision=auto"], "rollout.precision = ", "remove it"),
        ("train", ["sft.batch_size=8"], "sft.batch_size = 8", "it is of `rlinf sft`"),
        ("train", ["evaluation.custom.n=8"], "evaluation.custom.n = 8", "training validates on data.val_data_paths"),
        ("eval", ["algorithm.sampling_params.temperature=0.5"], "temperature = 0.5", "such as evaluation.custom.temperature"),
        ("eval", ["runner.seq_length=256"], "runner.seq_length = 256", "such as evaluation.custom.max_tokens"),
        ("eval", ["data.val_data_paths=[a]"], "data.val_data_paths = ", "such as evaluation.custom.path"),
        ("eval", ["cluster.component_placement={rollout: all}"], "cluster.component_placement = ", "engines take every device"),
        ("eval", ["evaluation.math500.n=8"], "evaluation.math500.n = 8", "evaluation.math500 is not evaluated, since its path is null"),
    ],
)
def test_a_word_that_the_command_would_not_read_is_refused(command: str, words: list[str], key: str, remedy: str) -> None:
    with pytest.raises(UserError) as error:
        check(command, SFT if command == "sft" else GRPO, *words, *(EVAL if command == "eval" else []))
    assert key in str(error.value) and remedy in str(error.value) and "command line" in str(error.value)


def test_the_same_settings_may_stand_in_a_file_that_serves_several_commands(tmp_path: Path) -> None:
    sections = "sft: {batch_size: 4}\nevaluation: {custom: {path: /p.jsonl}, math500: {n: 2}}\n"
    (tmp_path / "a.yaml").write_text(f"extends: {GRPO}\n{sections}")
    for command in VALIDATE:
        check(command, str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sft", ["rollout.model_dir=/m", "rollout.trust_remote_code=true", "actor.optim.lr=1e-4", "data.prompt_key=q"]),
        ("eval", [*EVAL, "rollout.precision=fp32", "actor.model.precision=fp32", "reward.timeout=2", "evaluation.custom.max_tokens=8"]),
    ],
)
def test_what_the_command_reads_may_be_set(command: str, words: list[str]) -> None:
    check(command, SFT if command == "sft" else GRPO, *words)


def test_what_is_not_read_are_keys_and_sections() -> None:
    names = {name for table in UNREAD.values() for name in table}
    assert names <= {*known_keys(), *known_sections()}


DEAD = {  # key -> a value, and a word with which it acts
    "runner.max_restarts": ("5", "runner.on_hang=restart"),
    "runner.profile_ranks": ("[0,1]", "runner.profile_steps=[2]"),
    "algorithm.kl_penalty_type": ("k1", "algorithm.kl_beta=0.1"),
    "algorithm.behav_imp_weight_cap": ("2", "algorithm.loss_type=decoupled-ppo"),
    "algorithm.importance_sampling_clip": ("3", "algorithm.importance_sampling_fix=true"),
    "algorithm.dynamic_sampling_max_batches": ("3", "algorithm.dynamic_sampling=true"),
    "data.chat_template_variables": ("{a: b}", "data.apply_chat_template=true"),
    "rollout.sglang": ("{attention_backend: triton}", "rollout.rollout_backend=sglang"),
    "reward.overlong_penalty": ("2", "reward.overlong_buffer=8"),
    "validation.n": ("2", f"{VALIDATES} validation.temperature=1"),
    "validation.temperature": ("1", VALIDATES),
    "validation.max_new_tokens": ("9", VALIDATES),
    "validation.top_p": ("0.9", f"{VALIDATES} validation.temperature=1"),
    "validation.top_k": ("5", f"{VALIDATES} validation.temperature=1"),
    "sft.reweighting_temperature": ("2", "sft.reweighting=lin_upper"),
    "actor.optim.min_lr": ("1e-6", "actor.optim.lr_decay_style=cosine actor.optim.lr_decay_steps=9"),
    "actor.optim.lr_decay_steps": ("9", "actor.optim.lr_decay_style=linear actor.optim.lr_warmup_steps=0"),
    "critic.optim.min_lr": ("1e-6", "critic.optim.lr_decay_style=cosine critic.optim.lr_decay_steps=9"),
    "critic.optim.lr_decay_steps": ("9", "critic.optim.lr_decay_style=linear"),
    **{
        f"{role}.lora.{key}": (value, f"{role}.lora.rank=4")
        for role in ("actor", "critic")
        for key, value in (("alpha", "9"), ("target_modules", "[linear_qkv]"), ("seed", "7"))
    },
    "evaluation.custom.top_p": ("0.9", "evaluation.custom.temperature=1"),
    "evaluation.custom.top_k": ("5", "evaluation.custom.temperature=1"),
    "evaluation.custom.instruction": ("Think.", "evaluation.custom.template=chat"),
}


def command_of(key: str) -> tuple[str, str, list[str]]:
    """The command that reads the key, and with what."""
    section = key.partition(".")[0]
    if section == "evaluation":
        return "eval", GRPO, EVAL
    return (
        {"sft": "sft"}.get(section, "train"),
        {"sft": SFT, "critic": "smollm2-135m-ppo-cpu", "validation": UNVALIDATED}.get(section, GRPO),
        [],
    )


OFF_BY_DEFAULT = [rule for rule in ONLY_WITH if not rule.acts(known_keys()[rule.switch].default)]


@pytest.mark.parametrize(
    "rule", [r for r in OFF_BY_DEFAULT if not r.key.startswith("evaluation.") or ".custom." in r.key], ids=lambda r: r.key
)
def test_a_key_that_acts_only_with_another_is_refused_without_it(rule: OnlyWith) -> None:
    key = rule.key
    (value, with_it), (command, config, words) = DEAD[key], command_of(key)
    with pytest.raises(UserError) as error:
        check(command, config, *words, f"{key}={value}")
    assert f"  {key} = " in str(error.value) and f"has a meaning only with {rule.switch}: " in str(error.value)
    check(command, config, *words, f"{key}={value}", *with_it.split())


def test_a_file_may_keep_what_is_switched_off_for_a_while_but_not_what_was_never_on(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"extends: {GRPO}\nrunner: {{max_restarts: 5}}\n")
    with pytest.raises(UserError, match="runner.max_restarts = 5 .*a.yaml:2.*has a meaning only with runner.on_hang: restart"):
        check("train", str(tmp_path / "a.yaml"))
    check("train", str(tmp_path / "a.yaml"), "runner.on_hang=abort")
    check("sft", SFT, "actor.optim.lr_decay_style=constant")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validation.n=2", "validation.temperature=1", "runner.val_check_interval=0"], "n = 2 .*only with runner.val_check_interval"),
        (["runner.keep_best=false", "runner.save_interval=0"], "keep_best = false .*has a meaning only with runner.save_interval"),
        (["runner.profile_steps=[2, 9]", "runner.max_steps=5"], "profile_steps = .*the run ends after step 5"),
        (["algorithm.num_update_sample_per_prompt=8", "algorithm.group_size=4"], "a prompt has algorithm.group_size .4. responses"),
        (["rollout.max_engine_restarts=5", "cluster.backend=local"], "max_engine_restarts = 5 .*cannot be started anew"),
    ],
)
def test_what_another_setting_leaves_no_room_for_is_refused_but_a_file_may_keep_it(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check("train", GRPO, *words)
    *kept, off = words
    lines = "".join(f"{name.replace('.', ': {')}: {value}}}\n" for name, value in (word.split("=") for word in kept[-1:]))
    (tmp_path / "a.yaml").write_text(f"extends: {GRPO}\n{lines}")
    check("train", str(tmp_path / "a.yaml"), off)


def test_an_evaluation_in_one_process_restarts_no_engine_and_ignores_what_is_of_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_engine_restarts = 5 .*cannot be started anew"):
        check("eval", GRPO, *EVAL, "rollout.max_engine_restarts=5", "cluster.backend=local")
    (tmp_path / "a.yaml").write_text(f"extends: {GRPO}\nrunner: {{profile_steps: [9], max_steps: 5}}\n")
    check("eval", str(tmp_path / "a.yaml"), *EVAL, "rollout.max_engine_restarts=5")


def test_steps_and_samples_at_the_limit_are_within_it() -> None:
    check(
        "train",
        GRPO,
        "runner.profile_steps=[5]",
        "runner.max_steps=5",
        "algorithm.group_size=4",
        "algorithm.num_update_sample_per_prompt=4",
    )
    check("train", GRPO, "runner.profile_steps=[9]", "runner.max_steps=-1", "cluster.backend=local", "rollout.max_engine_restarts=0")
