"""A checkpoint knows no layout: saved by one and loaded by another, training goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlinf.checks.tiny_model import write_model
from rlinf.config.schema import OptimConfig
from rlinf.errors import RunFailed, UserError
from rlinf.training import checkpoint
from rlinf.weights.tensor_folder import Stored, digest
from tests.training_ranks import (
    VOCAB,
    build,
    logprobs,
    make_batch,
    merged,
    minibatches,
    raw,
    sample_logprobs,
    snapshot,
    update,
    whole_state,
)

# large enough an epsilon that rounding noise in a vanishing gradient does not become a whole Adam step
OPTIM = OptimConfig(lr=2e-3, adam_eps=1e-3, weight_decay=0.05, clip_grad=1.0, loss_scale_window=2, initial_loss_scale=2.0**14)
SAVED = (4, 2, 2)
LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (3, 1, 1), (4, 2, 1), (4, 1, 4), (4, 1, 2, 2), SAVED]
FAMILIES = ["qwen2", "qwen2-tied", "qwen3", "llama"]


def at_layout(layout: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("ranks", "tp", "pp", "cp"), layout))


def next_step(engine: Any, bits: bool) -> dict[str, Any]:
    """What the run does next, and what it then holds."""
    done = update(engine, minibatches(engine)[0])
    steps = engine.steps, engine.optimizer_state.steps()
    after = {"loss": done.metrics.sums["loss"].item(), "norm": done.grad_norm, "steps": steps, "state": whole_state(engine)}
    return after | ({"bits": snapshot(engine)} if bits else {})


def train_and_save(at: Any, model: Path, step_dir: Path, precision: str) -> dict[str, Any]:
    engine = build(at, model, OPTIM, precision)
    for mini in minibatches(engine):
        update(engine, mini)
    update(engine, minibatches(engine)[1])
    checkpoint.save(engine, step_dir, model)
    saved = {"state": whole_state(engine), "bits": snapshot(engine), "steps": (engine.steps, engine.optimizer_state.steps())}
    after = next_step(engine, bits=True)
    return {"saved": saved, "next": after}


def load_and_go_on(at: Any, model: Path, step_dir: Path, precision: str) -> dict[str, Any]:
    engine = build(at, model, OPTIM, precision)
    update(engine, minibatches(engine)[1])  # something else was there before
    checkpoint.load(engine, step_dir)
    loaded = {"state": whole_state(engine), "bits": snapshot(engine), "steps": (engine.steps, engine.optimizer_state.steps())}
    after = next_step(engine, bits=True)
    return {"saved": loaded, "next": after}


def all_equal(a: dict[str, dict[str, np.ndarray]], b: dict[str, dict[str, np.ndarray]]) -> bool:
    return all(a[kind].keys() == b[kind].keys() and all(np.array_equal(a[kind][n], b[kind][n]) for n in a[kind]) for kind in a)


@pytest.fixture(scope="module")
def saved_runs(rank_pool: Any, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(family, precision) -> folder of the checkpoint, and what each rank saw."""
    runs = {}
    for family, precision in [*((f, "fp32") for f in FAMILIES), ("qwen2-tied", "bf16"), ("llama", "fp16")]:
        (tiny_models[family] / "tokenizer_config.json").write_text('{"marker": 1}\n')
        folder = tmp_path_factory.mktemp("saved") / f"{family}-{precision}"
        runs[family, precision] = folder, rank_pool.run(train_and_save, tiny_models[family], folder, precision, **at_layout(SAVED))
    return runs


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_opens_in_every_layout(
    rank_pool: Any, tiny_models: dict[str, Path], saved_runs: Any, family: str, layout: tuple[int, ...]
) -> None:
    folder, uninterrupted = saved_runs[family, "fp32"]
    resumed = rank_pool.run(load_and_go_on, tiny_models[family], folder, "fp32", **at_layout(layout))
    before, after = (merged([r["saved"]["state"] for r in ranks]) for ranks in (uninterrupted, resumed))
    assert all_equal(before, after)  # weights, master weights and both moments, bit for bit
    assert {r["saved"]["steps"] for r in resumed} == {r["saved"]["steps"] for r in uninterrupted} == {(3, 3)}
    want, got = (merged([r["next"]["state"] for r in ranks]) for ranks in (uninterrupted, resumed))
    for rank in resumed:
        assert abs(rank["next"]["loss"] - uninterrupted[0]["next"]["loss"]) <= 1e-6
        assert rank["next"]["norm"] == pytest.approx(uninterrupted[0]["next"]["norm"], rel=1e-5) and rank["next"]["steps"] == (4, 4)
    for name, value in want["param"].items():
        assert np.abs(got["param"][name] - value).max() <= 1e-6, name


@pytest.mark.parametrize(("family", "precision"), [("qwen2-tied", "fp32"), ("qwen2-tied", "bf16"), ("llama", "fp16")])
def test_in_the_same_layout_it_goes_on_bit_for_bit(
    rank_pool: Any, tiny_models: dict[str, Path], saved_runs: Any, family: str, precision: str
) -> None:
    """Also the fp16 loss scale, which doubles every two good steps here, and the count that it waits for."""
    folder, uninterrupted = saved_runs[family, precision]
    resumed = rank_pool.run(load_and_go_on, tiny_models[family], folder, precision, **at_layout(SAVED))
    for was, now in zip(uninterrupted, resumed):
        assert now["saved"]["bits"] == was["saved"]["bits"]
        assert now["next"]["bits"] == was["next"]["bits"] and now["next"]["loss"] == was["next"]["loss"]


def test_a_checkpoint_of_bf16_holds_the_fp32_masters(rank_pool: Any, tiny_models: dict[str, Path], saved_runs: Any) -> None:
    folder, uninterrupted = saved_runs["qwen2-tied", "bf16"]
    (resumed,) = rank_pool.run(load_and_go_on, tiny_models["qwen2-tied"], folder, "bf16", ranks=1)
    before = merged([r["saved"]["state"] for r in uninterrupted])
    assert all_equal(before, resumed["saved"]["state"])
    name = "model.layers.0.mlp.up_proj.weight"
    rounded = torch.from_numpy(before["param"][name]).bfloat16().float().numpy()
    assert np.array_equal(rounded, before["model"][name]) and not np.array_equal(rounded, before["param"][name])


def logprobs_of(at: Any, model: Path, step_dir: Path) -> list[np.ndarray] | None:
    engine = build(at, model, OPTIM)
    checkpoint.load(engine, step_dir)
    packs, *_ = minibatches(engine, n=1, budget=10_000)[0]
    values = logprobs(engine, packs)
    return values and [v.numpy() for v in values]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hf_folder_opens_in_transformers_and_computes_the_same(
    rank_pool: Any, tiny_models: dict[str, Path], saved_runs: Any, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, uninterrupted = saved_runs[family, "fp32"]
    model = AutoModelForCausalLM.from_pretrained(str(folder / "hf"), dtype=torch.float32)
    state = {n: p.detach().numpy() for n, p in model.named_parameters()}
    weights = merged([r["saved"]["state"] for r in uninterrupted])["model"]
    assert state.keys() == weights.keys() and all(np.array_equal(state[n], weights[n]) for n in weights)
    assert json.loads((folder / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((folder / "hf" / "tokenizer_config.json").read_text()) == {"marker": 1}
    (got,) = rank_pool.run(logprobs_of, tiny_models[family], folder, ranks=1)
    with torch.no_grad():
        want = torch.cat([sample_logprobs(model, g, s)[0] for g in make_batch(VOCAB).groups for s in g.samples])
    assert np.abs(np.concatenate(got) - want.numpy()).max() <= 1e-5


def test_the_hf_folder_of_bf16_says_so(saved_runs: Any) -> None:
    from safetensors import safe_open

    folder, _ = saved_runs["qwen2-tied", "bf16"]
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    index = json.loads((folder / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] and "lm_head.weight" not in index["weight_map"]
    with safe_open(str(folder / "hf" / files[0]), "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}


def refusal(at: Any, model: Path, step_dir: Path) -> str:
    engine = build(at, model, OPTIM)
    with pytest.raises(UserError) as caught:
        checkpoint.load(engine, step_dir)
    return str(caught.value)


@pytest.mark.parametrize("change", [{"vocab_size": 140}, {"vocab_size": 120}, {"num_hidden_layers": 2}, {"tie_word_embeddings": True}])
def test_a_checkpoint_of_another_model_is_refused(rank_pool: Any, saved_runs: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    """Nothing is cut, padded or left out to make it fit."""
    folder, _ = saved_runs["qwen2", "fp32"]
    config = json.loads((folder / "hf" / "config.json").read_text())
    other = write_model(tmp_path / "other", config | change)
    (message,) = rank_pool.run(refusal, other, folder, ranks=1)
    assert "in the model of this run" in message and str(folder / "actor") in message


def refused_model(at: Any, model: Path) -> str:
    with pytest.raises(UserError) as caught:
        build(at, model, OPTIM)
    return str(caught.value)


def test_weights_that_do_not_fit_their_configuration_are_refused(rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_models["qwen2"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 9}))
    (message,) = rank_pool.run(refused_model, tmp_path / "model", ranks=1)
    assert "tensor model.embed_tokens.weight is (" in message and "by the model's config.json" in message


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["exp_avg-s1-00001.safetensors", "param-s0-00001.safetensors", "state.json", "index-s1.json"])
@pytest.mark.parametrize("damage", [Path.unlink, cut_short])
def test_a_missing_or_damaged_file_is_named(
    rank_pool: Any, tiny_models: dict[str, Path], saved_runs: Any, tmp_path: Path, file: str, damage: Any
) -> None:
    folder, _ = saved_runs["qwen2-tied", "fp32"]
    shutil.copytree(folder, tmp_path / "broken")
    damage(tmp_path / "broken" / "actor" / file)
    (message,) = rank_pool.run(refusal, tiny_models["qwen2-tied"], tmp_path / "broken", ranks=1)
    if file == "index-s1.json" and damage is Path.unlink:  # which stages there were is not known; which tensor is missing is
        assert "no tensor named model." in message and "incomplete" in message and str(tmp_path / "broken") in message
    else:
        assert str(tmp_path / "broken" / "actor" / file) in message and "missing or damaged" in message


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["param", "exp_avg", "exp_avg_sq"])
def test_a_flipped_byte_is_named_with_file_and_tensor(
    rank_pool: Any, tiny_models: dict[str, Path], saved_runs: Any, tmp_path: Path, kind: str
) -> None:
    folder, _ = saved_runs["qwen2-tied", "fp32"]
    shutil.copytree(folder, tmp_path / "broken")
    damaged = tmp_path / "broken" / "actor" / f"{kind}-s1-00001.safetensors"
    flip_last_byte(damaged)
    (message,) = rank_pool.run(refusal, tiny_models["qwen2-tied"], tmp_path / "broken", ranks=1)
    assert re.match(rf"{damaged}: tensor model\.(layers\.[23]\.\S+|norm\.weight) is damaged", message), message


def bad_hf(at: Any, model: Path, step_dir: Path, fault: str) -> str:
    """The hf/ folder is damaged between its writing and its check; what the check says."""
    engine = build(at, model, OPTIM)
    writing = checkpoint.Writing(engine, step_dir, model)
    before = snapshot(engine)
    finish = checkpoint.finish_hf_folder

    def finish_with_fault(folder: Path, *rest: Any) -> Any:
        stored = finish(folder, *rest)
        file = folder / stored["model.norm.weight"].file
        if fault == "config":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
        elif fault == "byte":
            flip_last_byte(file)
        else:  # other weights, properly written: only what they compute gives them away
            tensors = load_file(file)
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
            save_file(tensors, file, metadata={"format": "pt"})
            stored |= {n: Stored(file.name, digest(t)) for n, t in tensors.items()}
        return stored

    checkpoint.finish_hf_folder = finish_with_fault
    with pytest.raises((RunFailed, UserError)) as caught:
        writing.finish()
    checkpoint.finish_hf_folder = finish
    assert fault != "weights" or snapshot(engine) == before  # the comparison leaves the engine as it was
    return str(caught.value)


@pytest.mark.parametrize(("fault", "words"), [("config", "describes another model"), ("byte", "is damaged"), ("weights", "other numbers")])
def test_an_hf_folder_that_is_not_the_model_is_not_called_saved(
    rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path, fault: str, words: str
) -> None:
    (message,) = rank_pool.run(bad_hf, tiny_models["llama"], tmp_path / "step", fault, ranks=1)
    assert words in message and str(tmp_path / "step" / "hf") in message


def in_the_background(at: Any, model: Path, step_dir: Path) -> dict[str, Any]:
    """Train on while the checkpoint is being written; the checkpoint is of the moment it was begun."""
    engine = build(at, model, OPTIM)
    minis = minibatches(engine)
    update(engine, minis[0])
    begun = snapshot(engine)
    writing = checkpoint.Writing(engine, step_dir, model, background=True)
    update(engine, minis[1])
    trained_on = snapshot(engine)
    writing.finish()
    assert writing.written and snapshot(engine) == trained_on != begun
    other = build(at, model, OPTIM)
    checkpoint.load(other, step_dir)
    same = snapshot(other) == begun
    return same


@pytest.mark.parametrize("layout", [(1, 1, 1), SAVED, (3, 1, 1), (4, 2, 1, 2)])
def test_a_background_checkpoint_is_of_the_moment_it_was_begun(
    rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path, layout: tuple[int, int, int]
) -> None:
    assert all(rank_pool.run(in_the_background, tiny_models["qwen2-tied"], tmp_path / "step", **at_layout(layout)))


def failing_writer(at: Any, model: Path, step_dir: Path) -> list[str]:
    engine = build(at, model, OPTIM)
    step_dir.mkdir()
    (step_dir / "actor").write_text("a file where the folder should be")
    writing = checkpoint.Writing(engine, step_dir, model, background=True)
    messages = []
    while not messages:
        try:
            assert not writing.written
        except RunFailed as error:
            messages.append(str(error))
    with pytest.raises(RunFailed) as caught:
        writing.finish()
    return [*messages, str(caught.value)]


def test_an_error_of_the_background_writer_is_raised_by_the_next_look_at_it(
    rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    (messages,) = rank_pool.run(failing_writer, tiny_models["llama"], tmp_path / "step", ranks=1)
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(f"the checkpoint {tmp_path / 'step'} could not be written: ") and "exists" in message


def random_states(at: Any, model: Path, step_dir: Path) -> bool:
    """Whether a step, log-probabilities, a checkpoint and its loading draw from any random number generator."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def look() -> list[bytes]:
        tracked = get_cuda_rng_tracker().get_states()
        states = [torch.get_rng_state(), *(tracked[name] for name in sorted(tracked))]
        return [raw(s) for s in states] + [repr(np.random.get_state()).encode(), repr(random.getstate()).encode()]

    engine = build(at, model, OPTIM)
    before = look()
    minis = minibatches(engine)
    logprobs(engine, minis[0][0])
    update(engine, minis[0])
    checkpoint.save(engine, step_dir, model)
    checkpoint.load(engine, step_dir)
    same = look() == before
    torch.rand(1)
    assert look() != before  # the look sees a draw
    return same


def test_training_draws_no_random_numbers_so_a_checkpoint_needs_no_generator_state(
    rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    assert all(rank_pool.run(random_states, tiny_models["qwen2"], tmp_path / "step", **at_layout(SAVED)))


def before_any_step(at: Any, model: Path, step_dir: Path) -> bool:
    """A checkpoint of a run in which every mini-batch was skipped."""
    engine = build(at, model, OPTIM)
    checkpoint.save(engine, step_dir, model)
    other = build(at, model, OPTIM)
    checkpoint.load(other, step_dir)
    same = engine.steps == other.steps == 0
    for mini in minibatches(engine):
        update(engine, mini), update(other, mini)
    same = same and snapshot(engine) == snapshot(other)
    return same


def test_a_checkpoint_before_the_first_step_is_one_too(rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    assert all(rank_pool.run(before_any_step, tiny_models["llama"], tmp_path / "start", **at_layout(SAVED)))
