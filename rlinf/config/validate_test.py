"""Rules across keys and against the model's shape: each violation is named with its key and a remedy."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest

from rlinf.config.keys import known_keys
from rlinf.config.load import EXAMPLES, load, value_of
from rlinf.config.model import load_model_config, planned_model_config, validate_model, validate_scorer
from rlinf.config.settings import COMMAND_LINE
from rlinf.config.validate import validate
from rlinf.errors import UserError

CRITIC = ["algorithm.adv_type=gae", "cluster.component_placement={'actor,critic,rollout,reward': all}"]
SCORER = ["token_reward.model_dir=/m", "cluster.component_placement={'actor,token_reward,rollout,reward': all}"]
BASE = ["rollout.model_dir=/m", "data.train_data_paths=[a.jsonl]"]
MASK = ["algorithm.importance_sampling_fix=true", "algorithm.importance_sampling_type=token-mask"]


def check(tmp_path: Path, *words: str) -> None:
    (tmp_path / "a.yaml").write_text("")
    resolved = load(str(tmp_path / "a.yaml"), [*BASE, *words])
    validate(resolved.config, resolved.provenance)


def test_transformer_engine_is_refused_for_the_cpu_alone(tmp_path: Path) -> None:
    for device in ("cuda", "auto"):
        check(tmp_path, "actor.model.transformer_impl=transformer_engine", f"cluster.device={device}")
    with pytest.raises(UserError, match="Transformer Engine computes on a GPU alone, but cluster.device is cpu"):
        check(tmp_path, "actor.model.transformer_impl=transformer_engine", "cluster.device=cpu")


@pytest.mark.parametrize("name", [p.stem for p in EXAMPLES.glob("*.yaml") if "-sft-" not in p.stem])
def test_the_examples_are_valid(name: str) -> None:
    resolved = load(name)
    validate(resolved.config)
    hf, warnings = planned_model_config(resolved.config.rollout.model_dir)
    assert hf is not None
    validate_model(resolved.config, hf)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["actor.optim.lr=0"],
        ["algorithm.ratio_clip_eps=0.3", "algorithm.clip_ratio_high=0.28"],
        ["actor.model.tensor_model_parallel_size=2", "actor.model.sequence_parallel=true"],
        ["actor.optim.lr_decay_style=cosine", "actor.optim.lr_decay_steps=10", "actor.optim.lr_warmup_steps=2"],
        ["actor.model.recompute_granularity=selective"],
        ["runner.resume_dir=auto"],
        ["rollout.weight_transport=device_ipc", "rollout.max_engine_restarts=0"],
        [*CRITIC, "algorithm.group_size=1"],
        [*CRITIC, "algorithm.gae_lambda=0.95", "critic.warmup_steps=4", "runner.max_steps=5", "critic.value_clip=null"],
        [*CRITIC, "algorithm.kl_beta=0.01", "algorithm.kl_in=reward"],
        [*SCORER, "token_reward.reduce=last", "token_reward.weight=0.5", "token_reward.output=probability"],
        [*SCORER, "algorithm.dense_rewards=true", "algorithm.adv_type=reinforce++"],
        ["runner.resume_dir=logs/a/checkpoints/step_000050/"],
        ["runner.resume_dir=logs/a/checkpoints/latest"],
        ["runner.resume_dir=logs/a/checkpoints/best/"],
        ["algorithm.importance_sampling_fix=true"],
        ["algorithm.importance_sampling_fix=true", "algorithm.importance_sampling_type=k3-mask", "algorithm.importance_sampling_clip=0.01"],
        ["algorithm.importance_sampling_fix=true", "algorithm.importance_sampling_type=token-mask", "algorithm.importance_sampling_low=0"],
        ["algorithm.loss_type=decoupled-ppo", "algorithm.clip_ratio_c=3", "algorithm.importance_sampling_normalize=true"],
        ["algorithm.loss_type=decoupled-ppo", "algorithm.recompute_logprobs=false"],
        [
            "algorithm.adv_type=reinforce++",
            "algorithm.group_size=1",
            "algorithm.kl_beta=0.001",
            "algorithm.kl_in=reward",
            "algorithm.gamma=0.99",
        ],
        ["algorithm.num_update_sample_per_prompt=2", "algorithm.n_minibatches=1024"],
        ["algorithm.num_update_sample_per_prompt=8"],
        ["algorithm.dynamic_sampling=true", "algorithm.dynamic_sampling_batch_size=1536", "algorithm.overlong_filtering=true"],
        ["algorithm.dynamic_sampling=true", "algorithm.schedule=wallclock", "algorithm.max_staleness=1"],
    ],
)
def test_legal_settings_pass(tmp_path: Path, words: list[str]) -> None:
    check(tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["algorithm.group_size=1"], "algorithm.group_size = 1 (command line): adv_type grpo"),
        (["data.seed=9223372036854775808"], "data.seed = 9223372036854775808 (command line): must be less than 9223372036854775808"),
        (
            ["algorithm.adv_type=gae"],
            "algorithm.adv_type = gae (command line): gae needs a critic; give it devices in cluster.component_placement",
        ),
        (
            ["cluster.component_placement={'actor,critic,rollout,reward': all}"],
            "places a critic, but adv_type grpo has none; remove it, or set",
        ),
        (["critic.optim.lr=1e-4"], "critic.optim.lr = 0.0001 (command line): there is no critic with adv_type grpo"),
        (["critic.warmup_steps=1"], "critic.warmup_steps = 1 (command line): there is no critic with adv_type grpo"),
        (["algorithm.gae_lambda=0.95"], "algorithm.gae_lambda = 0.95 (command line): has a meaning only with algorithm.adv_type: gae"),
        ([*CRITIC, "algorithm.gae_lambda=1.5"], "must be at most 1"),
        (
            ["token_reward.model_dir=/m"],
            "the model has no devices; give it some in cluster.component_placement, such as `actor,token_reward",
        ),
        (
            ["cluster.component_placement={'actor,token_reward,rollout,reward': all}"],
            "token_reward.model_dir names no model; set it, or remove the component",
        ),
        (["token_reward.reduce=last"], "token_reward.reduce = last (command line): there is no token reward model"),
        (["algorithm.dense_rewards=true"], "needs the scores of a token reward model"),
        ([*SCORER, "algorithm.dense_rewards=true"], "adv_type grpo compares whole responses; use gae or reinforce++"),
        ([*SCORER, "token_reward.model.recompute_granularity=selective"], "a frozen model keeps no activations"),
        ([*SCORER, "token_reward.model.sequence_parallel=true"], "needs token_reward.model.tensor_model_parallel_size > 1"),
        ([*CRITIC, "critic.model.sequence_parallel=true"], "needs critic.model.tensor_model_parallel_size > 1"),
        (
            [*CRITIC, "critic.optim.lr_decay_style=linear"],
            "critic.optim.lr_decay_steps = 0 (default): lr_decay_style linear needs more steps",
        ),
        ([*CRITIC, "critic.warmup_steps=5", "runner.max_steps=5"], "critic.warmup_steps = 5 (command line): leaves no step for the actor"),
        (["algorithm.group_size=1", "algorithm.adv_type=rloo"], "adv_type rloo"),
        (["algorithm.n_minibatches=3"], "algorithm.n_minibatches = 3 (command line): does not divide the global batch of 4096 samples"),
        (["algorithm.n_minibatches=3"], "the nearest that does is 2"),
        (["data.max_prompt_length=2000"], "runner.seq_length = 2048 (default): must hold data.max_prompt_length (2000)"),
        (["runner.max_tokens_per_mbs=2047"], "runner.max_tokens_per_mbs = 2047 (command line): must be at least runner.seq_length (2048)"),
        (["actor.model.recompute_granularity=full"], "actor.model.recompute_method = null (default): recompute_granularity full needs"),
        (["actor.model.recompute_granularity=full", "actor.model.recompute_method=block"], "recompute_num_layers = null"),
        (["actor.model.recompute_num_layers=3"], "has a meaning only with actor.model.recompute_granularity: full"),
        (["actor.model.sequence_parallel=true"], "needs actor.model.tensor_model_parallel_size > 1"),
        (["actor.lora.rank=4", "actor.lora.target_modules=[]"], "names no matrix, so nothing would be trained"),
        (["actor.lora.rank=4", "actor.lora.target_modules=[q_proj]"], "linear_qkv"),
        (["actor.lora.rank=-1"], "must be at least 0"),
        (["actor.lora.rank=4", "actor.lora.alpha=0"], "must be greater than 0"),
        (["algorithm.importance_sampling_fix=true", "algorithm.recompute_logprobs=false"], "set algorithm.recompute_logprobs: true"),
        (["algorithm.loss_type=decoupled-ppo", "algorithm.importance_sampling_fix=true"], "weighs actor over engine already"),
        (["algorithm.importance_sampling_type=k3-mask"], "has a meaning only with algorithm.importance_sampling_fix: true"),
        (["algorithm.importance_sampling_low=0.5"], "importance_sampling_low = 0.5 (command line): has a meaning only with"),
        (["algorithm.importance_sampling_normalize=true"], "importance_sampling_normalize = true (command line): has a meaning only with"),
        (
            ["algorithm.loss_type=decoupled-ppo", "algorithm.recompute_logprobs=false", "algorithm.importance_sampling_normalize=true"],
            "importance_sampling_normalize = true (command line): needs the weights of the whole batch",
        ),
        (["algorithm.importance_sampling_fix=true", "algorithm.importance_sampling_low=0.5"], "token-truncate has no lower bound"),
        ([*MASK, "algorithm.importance_sampling_low=3"], "must be at most algorithm.importance_sampling_clip (2.0)"),
        ([*MASK, "algorithm.importance_sampling_clip=0.5"], "set importance_sampling_low"),
        (["algorithm.kl_in=reward"], "algorithm.kl_in = reward (command line): there is no KL term"),
        (["algorithm.gamma=1.1"], "algorithm.gamma = 1.1 (command line): must be at most 1"),
        (["algorithm.gamma=0.9", "algorithm.num_update_sample_per_prompt=2"], "set algorithm.normalize_advantages: false"),
        (
            ["algorithm.num_update_sample_per_prompt=3", "algorithm.n_minibatches=5"],
            "of 1536 samples (data.rollout_batch_size 512 x algorithm.num_up",
        ),
        (["algorithm.dynamic_sampling=true", "algorithm.group_size=1", "algorithm.adv_type=reinforce++"], "never both right and wrong"),
        (["algorithm.dynamic_sampling_batch_size=9"], "only with algorithm.dynamic_sampling: true"),
        (
            ["algorithm.dynamic_sampling=true", "algorithm.dynamic_sampling_batch_size=9", "algorithm.schedule=wallclock"],
            "algorithm.dynamic_sampling_batch_size = 9 (command line): has a meaning only with algorithm.schedule: logical",
        ),
        (
            ["algorithm.ratio_clip_eps=0.3", "algorithm.clip_ratio_low=0.2", "algorithm.clip_ratio_high=0.28"],
            "algorithm.ratio_clip_eps = 0.3 (command line): acts only where algorithm.clip_ratio_low or clip_ratio_high is null",
        ),
        (["algorithm.clip_ratio_c=1"], "algorithm.clip_ratio_c = 1.0 (command line): must be greater than 1"),
        (["algorithm.clip_ratio_c=3", "algorithm.loss_type=gspo"], "the dual clip belongs to loss_type ppo and decoupled-ppo, not gspo"),
        (["actor.optim.lr_decay_style=linear"], "actor.optim.lr_decay_steps = 0 (default): lr_decay_style linear needs more steps"),
        (["actor.optim.lr_decay_style=linear", "actor.optim.lr_decay_steps=5", "actor.optim.min_lr=1"], "must be at most actor.optim.lr"),
        (["reward.four_levels=true", "reward.format_reward=1"], "reward.four_levels pays for the format already"),
        (["reward.four_levels=true", "reward.undecided_reward=0"], "it counts as wrong; set it to null"),
        (["rollout.stall_timeout=60", "cluster.backend=local"], "rollout.stall_timeout = 60 (command line): an engine that shares"),
        (["rollout.weight_transport=device_ipc"], "set rollout.max_engine_restarts to 0"),
        (["rollout.rollout_backend=embedded", "rollout.tensor_parallel_size=2"], "tensor_parallel_size = 2 (command line): the embedded"),
        (["cluster.backend=local", "cluster.num_nodes=2"], "cluster.backend = local (command line): local runs everything in one process"),
        (["runner.resume_dir=latest"], "runner.resume_dir = latest (command line): must be null, auto, or the path of a step_* folder"),
        (["runner.experiment_name=a/b"], "cannot be empty or contain `/`"),
        (["runner.max_steps=0"], "runner.max_steps = 0 (command line): must be at least 1, or -1"),
        (["runner.val_check_interval=5"], "data.val_data_paths is empty"),
        (["validation.n=4"], "validation.n = 4 (command line): greedy answers of one problem are all equal"),
        (["validation.temperature=1", "validation.top_p=1.5"], "validation.top_p = 1.5 (command line): must be at most 1"),
        (["validation.max_new_tokens=999999"], "leaves room for "),
        (["validation.temperature=1"], "has a meaning only with data.val_data_paths: [a file]"),
        (["validation.top_k=5"], "has a meaning only with validation.temperature: more than 0"),
        (["data.train_data_paths=[]"], "data.train_data_paths = [] (command line): is empty"),
        (["data.tasks=[]"], "write null to keep all"),
        (["reward.reward_scale=0"], "reward.reward_scale = 0.0 (command line): every response would have the reward 0"),
        (["reward.reward_scale=-1"], "reward.reward_scale = -1.0 (command line): must be at least 0"),
        (["reward.own_parts={a: concise}"], "a: concise names no function; write path/to/file.py:function"),
        (["reward.own_parts={a/b: x.py:f}"], "'a/b' is to name a curve, rollout/reward_own/<name>; give it a name of letters"),
        (["reward.own_group_parts={a: judge}"], "a: judge names no function; write path/to/file.py:function"),
        (["reward.own_group_parts={a b: x.py:f}"], "'a b' is to name a curve, rollout/reward_own/<name>; give it a name of letters"),
        (["reward.own_parts={a: x.py:f}", "reward.own_group_parts={a: x.py:g}"], "a is a part of reward.own_parts already; give one"),
        (["reward.own_timeout=60"], "reward.own_timeout = 60.0 (command line): has a meaning only with reward.own_tasks, own_parts or"),
        (["algorithm.sampling_params.do_sample=false"], "greedy responses of one prompt are all equal"),
        (["algorithm.sampling_params.top_p=1.5"], "must be at most 1"),
        (['algorithm.sampling_params.stop=[""]'], "an empty string would end every response"),
        ([f"algorithm.sampling_params.stop={[str(i) for i in range(33)]}", "rollout.rollout_backend=sglang"], "SGLang takes 32 at most"),
    ],
)  # fmt: skip
def test_violations_name_key_value_origin_and_remedy(tmp_path: Path, words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        check(tmp_path, *words)
    assert expected in str(error.value)


@pytest.mark.parametrize(("kind", "beyond"), [("at_least", -1), ("at_most", 1), ("more_than", 0), ("less_than", 0)])
def test_numbers_outside_their_bounds_are_refused(tmp_path: Path, kind: str, beyond: int) -> None:
    (tmp_path / "a.yaml").write_text("")
    loaded = load(str(tmp_path / "a.yaml"), BASE)
    bounded = {key.name: bound for key in known_keys().values() if (bound := getattr(key, kind)) is not None}
    assert bounded
    for key, bound in bounded.items():
        config, (section, _, name) = deepcopy(loaded.config), key.rpartition(".")
        setattr(value_of(config, section), name, bound + beyond)
        with pytest.raises(UserError, match=key):
            validate(config, loaded.provenance | {key: COMMAND_LINE})


def test_every_number_has_a_bound_or_a_rule(tmp_path: Path) -> None:
    ruled = {
        "runner.max_steps",
        "runner.max_tokens_per_mbs",
        "actor.model.recompute_num_layers",
        "critic.model.recompute_num_layers",
        "reward.undecided_reward",
    }
    ruled.add("token_reward.model.recompute_num_layers")
    bounds = lambda k: (k.at_least, k.at_most, k.more_than, k.less_than)
    assert {k.name for k in known_keys().values() if k.kind in (int, float) and bounds(k) == (None,) * 4} == ruled
    assert not any(set(bounds(k)) - {None} for k in known_keys().values() if k.kind not in (int, float))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{port: 3000}", "port is set by the engine"),
        ("{tp_size: 2}", "rollout.tensor_parallel_size"),
        ("{attention-backend: triton}", "underscores"),
    ],
)
def test_options_of_sglang_that_are_ours_or_no_names_are_refused(tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(tmp_path, f"rollout.sglang={options}")
    check(tmp_path, "rollout.sglang={attention_backend: triton}")


def test_all_violations_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        check(tmp_path, "algorithm.group_size=1", "runner.max_epochs=0", "actor.model.sequence_parallel=true")
    for key in ("algorithm.group_size", "runner.max_epochs", "actor.model.sequence_parallel"):
        assert key in str(error.value)


TP, PP = "actor.model.tensor_model_parallel_size", "actor.model.pipeline_model_parallel_size"
SHAPE = {"model_type": "qwen2", "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 28, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("words", "shape", "expected"),
    [
        ([f"{TP}=8"], {}, "tensor_model_parallel_size = 8 does not divide the model's 12 attention heads; use one of [1, 2, 4]"),
        ([f"{TP}=3"], {}, "does not divide the model's 4 key/value heads"),
        ([f"{TP}=4"], {"intermediate_size": 90}, "divide the model's 90 MLP units; use one of [1, 2]"),
        ([f"{TP}=4"], {"num_experts": 6}, "divide the model's 6 experts; use one of [1, 2]"),
        (["actor.lora.rank=8"], {"num_experts": 8}, "experts have no adapters, so leave out linear_fc1 and linear_fc2, e.g. actor.lora"),
        ([f"{PP}=3"], {}, "pipeline_model_parallel_size = 3 does not divide the model's 28 layers; use one of [1, 2, 4, 7,"),
        (["rollout.tensor_parallel_size=5"], {}, "rollout.tensor_parallel_size = 5 does not fit the model's 12 attention heads"),
        (["rollout.tensor_parallel_size=6"], {}, "rollout.tensor_parallel_size = 6 does not fit"),
        ([], {"max_position_embeddings": 1024}, "runner.seq_length = 2048 exceeds the model's max_position_embeddings 1024"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_the_parallel_sizes_are_named(tmp_path: Path, words: list[str], shape: dict, expected: str) -> None:
    (tmp_path / "a.yaml").write_text("")
    config = load(str(tmp_path / "a.yaml"), [*BASE, *words]).config
    with pytest.raises(UserError) as error:
        validate_model(config, SHAPE | shape)
    assert expected in str(error.value) and "/m" in str(error.value)


def test_a_model_that_scores_must_read_the_actors_tokens_and_fit_its_own_layout(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    config = load(str(tmp_path / "a.yaml"), [*BASE, *SCORER, "token_reward.model.tensor_model_parallel_size=3"]).config
    with pytest.raises(UserError) as error:
        validate_scorer(config, "token_reward", SHAPE | {"vocab_size": 9}, SHAPE | {"vocab_size": 10})
    for words in (
        "the token_reward's model /m",
        "token_reward.model.tensor_model_parallel_size = 3",
        "its vocab_size is 9, the actor's 10",
    ):
        assert words in str(error.value)


def test_engines_may_replicate_key_value_heads(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    validate_model(load(str(tmp_path / "a.yaml"), [*BASE, "rollout.tensor_parallel_size=12"]).config, SHAPE)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (None, "does not exist; give a local Hugging Face folder"),
        ({}, "has no config.json"),
        ({"config.json": "{oops"}, "config.json:1: not valid JSON"),
        ({"config.json": "[]"}, "config.json: holds no JSON object with the model's sizes; copy the file"),
        ({"config.json": '"\udc80"'}, "config.json: not UTF-8 (byte 1); copy the file"),
        ({"config.json": "[" * 100_000}, "config.json: not readable ("),
        ({"config.json": '{"hidden_size": 64, "hidden_size": 128}'}, "config.json: not readable (the key `hidden_size` is there twice)"),
        ({"config.json": json.dumps(SHAPE)}, "has no *.safetensors weights"),
        (
            {"config.json": json.dumps(SHAPE), "model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
            "model.safetensors is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`",
        ),
        ({"config.json": json.dumps(SHAPE), "pytorch_model.bin": ""}, "it has pytorch_model.bin: convert it"),
        ({"config.json": json.dumps(SHAPE), "model.safetensors": ""}, "has no tokenizer (tokenizer.json or"),
    ],
)
def test_model_folders_that_cannot_be_used_say_why(tmp_path: Path, files: dict[str, str] | None, expected: str) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        load_model_config(str(folder))
    assert expected in str(error.value) and str(folder) in str(error.value)


def test_a_complete_model_folder_gives_its_config(tmp_path: Path) -> None:
    for name, text in {"config.json": json.dumps(SHAPE), "model.safetensors": "", "tokenizer.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    assert load_model_config(str(tmp_path)) == SHAPE
    assert planned_model_config(str(tmp_path)) == (SHAPE, [])


def test_planning_without_the_model_takes_known_shapes_or_warns() -> None:
    hf, warnings = planned_model_config("/nowhere/DeepSeek-R1-Distill-Qwen-7B")
    assert hf is not None and hf["num_key_value_heads"] == 4 and "shapes are taken from examples/math/config/models" in warnings[0]
    hf, warnings = planned_model_config("/nowhere/other")
    assert hf is None and "not checked" in warnings[0]
