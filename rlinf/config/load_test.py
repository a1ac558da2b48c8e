"""Loading: precedence, provenance, interpolation, and one clear message for every way to write a configuration wrongly."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.config.keys import known_keys
from rlinf.config.load import ALIASES, EXAMPLES, find, load, to_yaml
from rlinf.errors import UserError


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text("rollout: {model_dir: /models/x}\n" + text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(str(write(folder, text)), overrides)
    return str(error.value)


def test_a_copy_of_an_example_may_lie_anywhere(tmp_path: Path) -> None:
    for name in ("qwen2.5-1.5b-grpo-megatron", "qwen2.5-1.5b-grpo-megatron.yaml", "grpo-1.5b-megatron"):
        assert load(str(write(tmp_path, f"extends: {name}\n")), []).config.algorithm.group_size == 16
    (tmp_path / "base.yaml").write_text("algorithm:\n  group_size: 4\n")
    assert load(str(write(tmp_path, "extends: base.yaml\n")), []).config.algorithm.group_size == 4
    with pytest.raises(UserError, match="or the name of one of: .*smollm2-135m-grpo-cpu"):
        load(str(write(tmp_path, "extends: smollm\n")), [])


def test_the_command_line_wins_over_the_file_over_extends_over_defaults(tmp_path: Path) -> None:
    write(tmp_path, "runner: {max_steps: 1, max_epochs: 2, seq_length: 3}", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\nrunner:\n  max_epochs: 20\n  seq_length: 30\n")
    resolved = load(str(path), ["runner.seq_length=300"])
    runner, who = resolved.config.runner, resolved.provenance
    assert (runner.max_steps, runner.max_epochs, runner.seq_length, runner.keep_checkpoints) == (1, 20, 300, 2)
    assert who["runner.max_steps"] == f"{tmp_path}/base.yaml:2"
    assert who["runner.max_epochs"] == f"{path}:4"
    assert who["runner.seq_length"] == "command line"
    assert who["runner.keep_checkpoints"] == "default"
    assert set(who) == set(known_keys()) and resolved.source == path


def test_placement_and_lists_are_replaced_as_a_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "cluster:\n  component_placement: {rollout: 0-47, 'actor,reward': 48}\n")
    assert load(str(path)).config.cluster.component_placement == {"rollout": "0-47", "actor,reward": "48"}
    words = ["cluster.component_placement={'actor,rollout,reward': all}", 'algorithm.sampling_params.stop=["\\n"]']
    config = load(str(path), words).config
    assert config.cluster.component_placement == {"actor,rollout,reward": "all"}
    assert config.algorithm.sampling_params.stop == ["\n"]


def test_lists_of_integers(tmp_path: Path) -> None:
    path = write(tmp_path, "runner: {profile_steps: [3, 4]}")
    resolved = load(str(path), ["runner.profile_ranks=[]"])
    assert (resolved.config.runner.profile_steps, resolved.config.runner.profile_ranks) == ([3, 4], [])
    (tmp_path / "again.yaml").write_text(to_yaml(resolved))
    again = load(str(tmp_path / "again.yaml")).config
    assert again.runner.profile_steps == [3, 4] and load(None, ["rollout.model_dir=m"]).config.runner.profile_ranks == [0]
    with pytest.raises(UserError, match="runner.profile_steps: expected list of integers"):
        load(str(path), ["runner.profile_steps=[3, x]"])
    with pytest.raises(UserError, match="expected list of integers"):
        load(str(path), ["runner.profile_steps=3"])


def test_a_section_whose_keys_are_all_commented_out_is_empty(tmp_path: Path) -> None:
    assert load(str(write(tmp_path, "runner:\n  # max_steps: 3\ndata:\n  seed: 5\n"))).config.data.seed == 5


def test_interpolations_reach_other_keys_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "7")
    text = "runner: {seq_length: 128, max_tokens_per_mbs: '${runner.seq_length}', max_steps: '${oc.env:STEPS}'}\n"
    text += "data: {train_data_paths: ['${oc.env:NOT_SET,/data}/a.jsonl']}"
    config = load(str(write(tmp_path, text)), ["runner.seq_length=256"]).config
    assert (config.runner.max_tokens_per_mbs, config.runner.max_steps) == (256, 7)
    assert config.data.train_data_paths == ["/data/a.jsonl"]


def test_values_take_the_type_of_their_key(tmp_path: Path) -> None:
    text = "runner: {experiment_name: 007, max_steps: 1e3}\nactor: {optim: {lr: 1e-5, weight_decay: 0}}\ndata: {tasks: [on, 5]}"
    config = load(str(write(tmp_path, text)), ["rollout.model_dir=~/model", "runner.resume_dir=null"]).config
    assert config.runner.experiment_name == "007" and config.runner.max_steps == 1000 and isinstance(config.runner.max_steps, int)
    assert config.actor.optim.lr == 1e-5 and isinstance(config.actor.optim.weight_decay, float)
    assert config.data.tasks == ["on", "5"] and config.runner.resume_dir is None
    assert config.rollout.model_dir == str(Path.home() / "model")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("10", 10), ("1_000", 1000), ("0x10", 16), ("+5", 5), ("1e3", 1000), ("0", 0),
        ("010", 'expected integer ≥ -1, got "010"; write 10: a leading zero'),
        ("'010'", "write 10"), ("-08", "write -8"), ("00", "write 0"),
        ("1:30", 'expected integer ≥ -1, got "1:30"'), ("1e-6", "expected integer ≥ -1, got 1e-06"), ("1,000", "expected integer"),
        ("yes", "expected integer ≥ -1, got true"),
    ],
)  # fmt: skip
def test_a_number_is_what_its_reader_takes_it_for_or_is_refused(tmp_path: Path, written: str, read: int | str) -> None:
    in_file, plain = write(tmp_path, f"runner:\n  keep_groups: {written}\n"), write(tmp_path, "", "plain.yaml")
    for config, words in ((in_file, []), (plain, [f"runner.keep_groups={written}"])):
        if isinstance(read, int):
            assert load(str(config), words).config.runner.keep_groups == read
        else:
            with pytest.raises(UserError, match="runner.keep_groups: ") as error:
                load(str(config), words)
            assert read in str(error.value)


@pytest.mark.parametrize(("written", "read"), [("1e-6", 1e-6), (".5", 0.5), ("2", 2.0), ("010", None), ("1:30", None), ("1:30.5", None)])
def test_so_is_a_number_with_a_fraction(tmp_path: Path, written: str, read: float | None) -> None:
    config = str(write(tmp_path, ""))
    if read is not None:
        assert load(config, [f"actor.optim.lr={written}"]).config.actor.optim.lr == read
    else:
        with pytest.raises(UserError, match="actor.optim.lr: expected number ≥ 0, got"):
            load(config, [f"actor.optim.lr={written}"])


def test_switches_are_words_of_yaml_and_none_is_no_name(tmp_path: Path) -> None:
    config = str(write(tmp_path, ""))
    assert [load(config, [f"data.shuffle={w}"]).config.data.shuffle for w in ("yes", "on", "True", "no", "off")] == [True] * 3 + [False] * 2
    for word in ("1", "y", "010"):
        with pytest.raises(UserError, match="data.shuffle: expected true or false"):
            load(config, [f"data.shuffle={word}"])
    for word in ("None", "none"):
        with pytest.raises(UserError, match=f"evaluation.opencompass_dir: .* got the word {word}; write null"):
            load(config, [f"evaluation.opencompass_dir={word}"])
    with pytest.raises(UserError, match="runner.profile_steps: expected list of integers"):
        load(config, ["runner.profile_steps=[010]"])


def test_what_to_yaml_prints_loads_to_the_same_configuration(tmp_path: Path) -> None:
    text = 'runner: {experiment_name: \'a: \\${b} #"c\'}\nalgorithm: {ratio_clip_eps: 1e-5, sampling_params: {stop: ["\\n", \'007\', "é"]}}'
    first = load(str(write(tmp_path, text)), ["data.tasks=[]", "cluster.component_placement={rollout: 0, actor: 0-3}"])
    printed = to_yaml(first)
    again = load(str(tmp_path / write(tmp_path, "", "again.yaml").name))
    assert again.config != first.config
    (tmp_path / "again.yaml").write_text(printed)
    assert load(str(tmp_path / "again.yaml")).config == first.config
    assert first.config.runner.experiment_name == 'a: ${b} #"c'
    line = next(x for x in printed.splitlines() if "ratio_clip_eps" in x)
    assert line.split("# ")[1] == f"{tmp_path}/run.yaml:3"


TEXT = st.text(st.one_of(st.sampled_from("${}\\'\"#:\n\t ~!&*?-0e.1"), st.characters(exclude_categories=("Cs",))), max_size=12)


@settings(max_examples=40, deadline=None)
@given(TEXT, st.lists(TEXT, max_size=3), st.dictionaries(TEXT, TEXT, max_size=2), st.floats(allow_nan=False, allow_infinity=False))
def test_any_value_survives_printing_and_loading(name: str, stop: list[str], placement: dict[str, str], lr: float) -> None:
    with TemporaryDirectory() as folder:
        path = write(Path(folder), "")
        resolved = load(str(path))
        resolved.config.runner.experiment_name, resolved.config.actor.optim.lr = name, lr
        resolved.config.algorithm.sampling_params.stop, resolved.config.cluster.component_placement = stop, placement
        path.write_text(to_yaml(resolved), encoding="utf-8")
        assert load(str(path)).config == resolved.config


@pytest.mark.parametrize("name", [*ALIASES, *(p.stem for p in EXAMPLES.glob("*.yaml"))])
def test_every_example_and_alias_loads_by_name(name: str) -> None:
    resolved = load(name)
    assert resolved.source.parent == EXAMPLES and resolved.source.stem == ALIASES.get(name, name)
    assert any(w.startswith("examples/math/config/") for w in resolved.provenance.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runner:\n  max_step: 3\n", ["run.yaml:3", "unknown key runner.max_step", "did you mean runner.max_steps?"]),
        ("runner: {group_size: 3}", ["unknown key runner.group_size", "did you mean algorithm.group_size?"]),
        ("zzz: 1", ["unknown key zzz", "the sections are cluster, runner"]),
        ("runner:\n  max_steps: soon\n", ["run.yaml:3", "runner.max_steps", "expected integer, got soon"]),
        ("runner: {max_steps: 1.5}", ["runner.max_steps: expected integer, got 1.5"]),
        ("runner: {max_steps: true}", ["runner.max_steps: expected integer, got true"]),
        ("data: {shuffle: 3}", ["data.shuffle: expected true or false, got 3"]),
        ("actor: {optim: {lr: fast}}", ["actor.optim.lr: expected number ≥ 0, got fast"]),
        ("actor: {optim: {lr: .inf}}", ["actor.optim.lr: expected a finite number"]),
        ("runner: {experiment_name: null}", ["runner.experiment_name: expected text, got null"]),
        (
            "data: {train_data_paths: a.jsonl}",
            ["data.train_data_paths: expected list of text, got a.jsonl; write it in brackets: [a.jsonl]"],
        ),
        ("data: {train_data_paths: null, val_data_paths: null}", ["data.train_data_paths: expected list of text, got null\n"]),
        ("data: {tasks: [[a]]}", ["data.tasks: expected list of text or null, got something nested"]),
        ("runner: {max_steps: !!python/name:os.system }", ["runner.max_steps: expected integer, got something nested or tagged"]),
        ("runner: {max_steps: !!int x}", ["got something nested or tagged"]),
        ("algorithm: {adv_type: gpro}", ["gpro is not one of grpo, rloo", "did you mean grpo?"]),
        ("runner: {logger: {logger_backends: [comet]}}", ["comet is not one of tensorboard, wandb"]),
        ("runner:\n  max_steps: 1\n  max_steps: 2\n", ["run.yaml:4: duplicate key runner.max_steps", "line 3"]),
        ("data: {}\ndata: {}", ["run.yaml:3: duplicate key data", "line 2"]),
        ("cluster: {component_placement: {actor: 0, actor: 1}}", ["cluster.component_placement: duplicate key actor"]),
        ("runner: {\n  max_steps: 1\n", ["run.yaml:4: not valid YAML"]),
        ("runner:\n\tmax_steps: 1\n", ["run.yaml:3: not valid YAML"]),
        ("actor: 3", ["run.yaml:2: actor is a section"]),
        ("runner: {max_steps: '${runner.foo}'}", ["runner.max_steps: cannot resolve ${runner.foo}", "'runner.foo' not found"]),
        ("runner: {output_dir: '${HOME}/x'}", ["runner.output_dir: cannot resolve ${HOME}/x", "environment is ${oc.env:HOME}"]),
        ("runner: {max_steps: '${oc.env:NOT_SET_ANYWHERE}'}", ["run.yaml:2", "NOT_SET_ANYWHERE"]),
        ("runner: {max_steps: '${subtract:1,2}'}", ["run.yaml:2", "Unsupported interpolation type subtract"]),
        ("runner: {max_steps: '${runner.max_epochs}', max_epochs: '${runner.max_steps}'}", ["runner.max_steps", "cannot resolve"]),
        ("extends: nowhere.yaml", ["run.yaml:2: extends:", "nowhere.yaml does not exist"]),
        ("extends: run.yaml", ["run.yaml:2: extends:", "break the cycle"]),
    ],
)
def test_mistakes_in_the_file_are_named_with_file_and_line(tmp_path: Path, text: str, words: list[str]) -> None:
    message = problems(tmp_path, text)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("runner.max_step=3", ["command line: unknown key runner.max_step; did you mean runner.max_steps?"]),
        ("optim.lr=3", ["did you mean actor.optim.lr?"]),
        ("runner.max_steps=x", ["command line: runner.max_steps: expected integer, got x"]),
        ("runner.max_steps", ["expected key=value, got 'runner.max_steps'"]),
        ("runner.max_steps=", ["runner.max_steps: expected integer, got null"]),
        ("actor.optim=3", ["actor.optim is a section; set one of its keys"]),
        ("data.tasks=[a", ["command line: data.tasks:1: not valid YAML"]),
        ("cluster.component_placement.rollout=0-3", ["write it as a whole: 'cluster.component_placement={rollout: ...}'"]),
        (
            "rollout.sglang.max_total_tokens=9",
            ["rollout.sglang is one value; write it as a whole: 'rollout.sglang={max_total_tokens: ...}'"],
        ),
        ("runner.max_steps.first=9", ["runner.max_steps is one value (integer) and has no first"]),
    ],
)
def test_mistakes_on_the_command_line_are_named(tmp_path: Path, override: str, words: list[str]) -> None:
    message = problems(tmp_path, "", override)
    for word in words:
        assert word in message


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    message = problems(tmp_path, "runner: {a: 1, max_steps: x}\ndata: {seed: y}", "b=1")
    for word in ("runner.a", "runner.max_steps", "data.seed", "unknown key b"):
        assert word in message


def test_a_cycle_over_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: run.yaml", "base.yaml")
    assert "break the cycle" in problems(tmp_path, "extends: base.yaml")


def test_a_missing_mandatory_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(UserError, match="rollout.model_dir is not set"):
        load(str(tmp_path / "a.yaml"))


def test_an_unknown_configuration_lists_what_there_is() -> None:
    with pytest.raises(UserError, match="did you mean grpo-1.5b-megatron") as error:
        find("grpo-1.5-megatron")
    assert "smollm2-135m-grpo-cpu" in str(error.value)


def test_what_is_there_but_no_configuration_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model/config.json", "run/config.yaml", "folder/a.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    for folder, words in (
        ("model", "a model folder, no configuration; give a YAML file, with rollout.model_dir="),
        ("run", "the folder of a run, which rlinf report, watch and replay take; its configuration is "),
        ("folder", "a folder, no configuration; give a YAML file in it"),
    ):
        with pytest.raises(UserError) as error:
            find(str(tmp_path / folder))
        assert str(error.value).startswith(f"{tmp_path / folder}: is {words}")
    with pytest.raises(UserError, match="runner.max_steps=3: is a setting; CONFIG comes first"):
        find("runner.max_steps=3")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/folder/a.yaml") == tmp_path / "folder" / "a.yaml"


def test_a_configuration_may_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("rollout: {model_dir: m}\n",), daemon=True)
    writer.start()
    assert load(str(tmp_path / "pipe")).config.rollout.model_dir == "m"


def test_several_files_to_extend_are_refused(tmp_path: Path) -> None:
    assert "run.yaml:2: extends: names one file, not several" in problems(tmp_path, "extends: [a.yaml, b.yaml]")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("runner.enable_dynamic_batch_size", "runner.max_tokens_per_mbs"),
        ("algorithm.training_batch_size_per_gpu", "runner.max_tokens_per_mbs"),
        ("algorithm.use_valid_token_scale", "token-mean is always the mean over all response tokens"),
        ("algorithm.sampling_params.min_new_tokens", "no effect"),
        ("algorithm.sampling_params.repetition_penalty", "log-probabilities differ"),
        ("rollout.model.model_path", "use rollout.model_dir"),
        ("actor.optim.bf16", "actor.model.precision: bf16"),
        ("actor.optim.fp16", "actor.model.precision: fp16"),
        ("actor.lr_sched.lr_decay_iters", "actor.optim.lr_decay_steps"),
        ("actor.megatron.ckpt_convertor.hf_model_path", "loaded directly from rollout.model_dir"),
        ("actor.megatron.use_dist_ckpt", "always open in every layout"),
        ("actor.group_name", "named after their component"),
        ("hydra.run.dir", "without hydra"),
        ("runner.task_type", "remove it"),
        ("inference.load_from_actor", "the actor recomputes"),
        ("actor_rollout_ref.rollout.n", "docs/migrating.md"),
        ("trainer.nnodes", "docs/migrating.md"),
        ("custom_reward_function.path", "reward.own_parts"),
        ("data.max_response_length", "algorithm.sampling_params.max_new_tokens"),
        ("algorithm.lam", "algorithm.gae_lambda"),
        ("algorithm.kl_ctrl.kl_coef", "algorithm.kl_in: reward"),
    ],
)
def test_keys_of_the_reference_that_are_gone_say_what_replaced_them(tmp_path: Path, key: str, words: str) -> None:
    message = problems(tmp_path, "", f"{key}=1")
    assert f"{key} is not a key here" in message and words in message


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("algorithm.loss_type=actor", "`ppo`"),
        ("algorithm.kl_penalty_type=low_var_kl", "`k3`"),
        ("rollout.rollout_backend=vllm", "sglang"),
        ("algorithm.adv_type=group_norm", "`grpo`"),
    ],
)
def test_values_of_the_reference_that_are_gone_say_what_replaced_them(tmp_path: Path, word: str, words: str) -> None:
    assert words in problems(tmp_path, "", word)


@pytest.mark.parametrize(("fast", "precision"), [("bf16", "bf16"), ("fp32", "fp32")])
def test_precision_auto_is_resolved_by_the_machine_and_says_so(fast: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("rlinf.config.load.fast_precision", lambda device: asked.append(device) or fast)
    resolved = load("smollm2-135m-grpo-cpu", ["rollout.precision=auto"])
    assert (resolved.config.actor.model.precision, resolved.config.rollout.precision) == (precision, precision)
    assert asked == ["cpu", "cpu"] and resolved.config.critic.model.precision == "bf16"  # only what is auto is chosen
    assert resolved.provenance["actor.model.precision"].endswith("smollm2-135m-grpo-cpu.yaml:43: auto, by this machine")
