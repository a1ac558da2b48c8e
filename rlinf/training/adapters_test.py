"""Adapters in an engine. That their gradients and steps are those of plain torch in every layout shows `rlinf check layout`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlinf.config.schema import LoraConfig
from rlinf.errors import UserError
from rlinf.training import checkpoint
from rlinf.training.publishing import sequence_logprobs
from rlinf.training.reference import ReferencePolicy
from rlinf.weights.adapters import merge
from rlinf.weights.mapping import adapted_matrix
from rlinf.weights.tensor_folder import open_hf_folder
from tests.training_ranks import build, logprobs, minibatches, numpy_dict, raw, snapshot, update, whole_state

LORA = LoraConfig(rank=4, alpha=8.0)
PROBES = [np.arange(3, 20, dtype=np.int32), np.arange(40, 30, -1, dtype=np.int32)]


def trained(at: Any, folder: Path, precision: str, lora: LoraConfig = LORA, **model: Any) -> Any:
    engine = build(at, folder, precision=precision, lora=lora, **model)
    for mini in minibatches(engine):
        assert not update(engine, mini).skipped
    return engine


def base(engine: Any) -> dict[str, bytes]:
    return {rule.megatron: raw(param) for rule, param in engine.state.params}


def first_steps(at: Any, folder: Path, precision: str) -> dict[str, Any]:
    engine, plain = build(at, folder, precision=precision, lora=LORA), build(at, folder, precision=precision)
    (packs, *_), *_ = minibatches(engine)
    first, without, before = logprobs(engine, packs), logprobs(plain, packs), base(engine)
    reference = ReferencePolicy(engine)
    for mini in minibatches(engine):
        update(engine, mini)
    own = snapshot(engine)
    with reference.swapped_in():
        looked_at = logprobs(engine, packs)
    moved = logprobs(engine, packs)
    published = sequence_logprobs(engine, PROBES)
    model = numpy_dict(engine.export())
    restored = snapshot(engine) == own
    stack = lambda values: None if values is None else torch.cat(values).numpy()
    return {
        "first": stack(first), "without": stack(without), "reference": stack(looked_at), "moved": stack(moved),
        "base untouched": base(engine) == before, "restored": restored, "reference in host memory": len(reference.frozen),
        "published": published, "model": model, "adapters": numpy_dict(engine.export("param")),
        "trained": sum(p.numel() for p in engine.model.parameters() if p.requires_grad),
        "in the optimizer": sum(p.numel() for b in engine.ddp.buffers for p in b.params),
    }  # fmt: skip


@pytest.mark.parametrize(("precision", "ranks", "tp", "pp"), [("fp32", 1, 1, 1), ("bf16", 4, 2, 2)])
def test_only_adapters_are_trained_and_what_is_handed_out_has_them_in_the_weights(
    rank_pool: Any, tiny_models: dict[str, Path], precision: str, ranks: int, tp: int, pp: int
) -> None:
    folder = tiny_models["qwen2-tied"]
    found = rank_pool.run(first_steps, folder, precision, ranks=ranks, tp=tp, pp=pp)
    last = found[-1]
    assert np.array_equal(last["first"], last["without"])  # B is 0: bit for bit
    assert np.array_equal(last["reference"], last["first"]) and np.abs(last["moved"] - last["first"]).max() > 1e-3
    assert all(r["base untouched"] and r["restored"] and r["reference in host memory"] == 0 for r in found)
    assert all(r["trained"] == r["in the optimizer"] for r in found)
    model = {n: t for r in found for n, t in r["model"].items()}
    adapters = {n: torch.from_numpy(t) for r in found for n, t in r["adapters"].items()}
    start = open_hf_folder(folder)
    for name, tensor in model.items():
        expected = start[name].to(torch.bfloat16 if precision == "bf16" else torch.float32)
        if any(adapted_matrix(n) == name for n in adapters):
            a, b = (adapters[name.removesuffix("weight") + f"lora_{x}.weight"].to(expected.dtype) for x in "AB")
            expected = merge(expected, a, b, 2.0)
        np.testing.assert_allclose(tensor, expected.float().numpy(), atol=1e-7 if precision == "fp32" else 0, rtol=1e-6)


def merged_logprobs(at: Any, folder: Path, out: Path) -> dict[str, Any]:
    engine = trained(at, folder, "fp32")
    checkpoint.save(engine, out, folder)
    exact = logprobs(engine, minibatches(engine)[0][0])
    with engine.adapters.in_the_weights():
        rounded = logprobs(engine, minibatches(engine)[0][0])
    other = build(at, out / "hf")
    again = logprobs(other, minibatches(other)[0][0])
    stack = lambda values: None if values is None else torch.cat(values).numpy()
    return {"exact": stack(exact), "merged": stack(rounded), "of the folder": stack(again)}


def test_the_policy_with_adapters_is_that_of_the_merged_folder(rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    found = rank_pool.run(merged_logprobs, tiny_models["qwen3"], tmp_path / "step", ranks=2, tp=2)[-1]
    np.testing.assert_allclose(found["merged"], found["exact"], atol=2e-6)
    np.testing.assert_array_equal(found["of the folder"], found["merged"])


def save_and_go_on(at: Any, folder: Path, step_dir: Path, precision: str) -> dict[str, Any]:
    engine = trained(at, folder, precision)
    checkpoint.save(engine, step_dir, folder)
    return {"saved": whole_state(engine), "next": next_step(engine), "bits": snapshot(engine)}


def load_and_go_on(at: Any, folder: Path, step_dir: Path, precision: str) -> dict[str, Any]:
    engine = build(at, folder, precision=precision, lora=LORA)
    update(engine, minibatches(engine)[1])  # something else was there before
    checkpoint.load(engine, step_dir)
    return {"saved": whole_state(engine), "next": next_step(engine), "bits": snapshot(engine)}


def next_step(engine: Any) -> tuple[float, float, int]:
    done = update(engine, minibatches(engine)[0])
    return done.metrics.sums["loss"].item(), done.grad_norm, engine.steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_holds_the_adapters_and_opens_in_any_layout(
    rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    folder, step_dir = tiny_models["llama"], tmp_path / "step"
    saved = rank_pool.run(save_and_go_on, folder, step_dir, precision, ranks=4, tp=2, pp=2)
    names = {n for r in saved for n in r["saved"]["param"]}
    assert names and all(".lora_" in n for n in names)
    for ranks, tp, pp in ((4, 2, 2), (1, 1, 1), (4, 1, 4), (3, 1, 1)):
        loaded = rank_pool.run(load_and_go_on, folder, step_dir, precision, ranks=ranks, tp=tp, pp=pp)
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            then = {n: t for r in saved for n, t in r["saved"][kind].items()}
            now = {n: t for r in loaded for n, t in r["saved"][kind].items()}
            assert then.keys() == now.keys() and all(np.array_equal(then[n], now[n]) for n in then)
        if (ranks, tp, pp) == (4, 2, 2):
            assert [r["bits"] for r in loaded] == [r["bits"] for r in saved] and loaded[-1]["next"] == saved[-1]["next"]
        elif precision == "fp32":
            np.testing.assert_allclose(loaded[-1]["next"], saved[-1]["next"], rtol=1e-4)


def refusals(at: Any, folder: Path, other: Path, step_dir: Path) -> list[str]:
    checkpoint.save(trained(at, folder, "fp32"), step_dir, folder)
    found = []
    for model, lora in ((folder, LoraConfig()), (folder, replace(LORA, alpha=9.0)), (folder, replace(LORA, rank=8)), (other, LORA)):
        with pytest.raises(UserError) as error:
            checkpoint.load(build(at, model, lora=lora), step_dir)
        found.append(str(error.value))
    return found


def test_adapters_go_on_beside_the_weights_and_with_the_settings_they_were_trained_with(
    rank_pool: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny_models["qwen2"]
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    none, scale, rank, weights = rank_pool.run(refusals, folder, other, tmp_path / "step", ranks=1)[0]
    assert "actor.lora of rank 4, alpha 8.0" in none and "this run has rank 0 (no adapters)" in none
    assert "alpha 9.0" in scale and "rank 8" in rank
    assert "rollout.model_dir: tensor model.layers.3.mlp.up_proj.weight differs" in weights


def test_activation_recompute_changes_no_bit(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    how = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain, again = (rank_pool.run(states, tiny_models["qwen2"], model, ranks=1)[0] for model in ({}, how))
    assert plain == again


def states(at: Any, folder: Path, model: dict[str, Any]) -> dict[str, bytes]:
    return snapshot(trained(at, folder, "fp32", **model))
