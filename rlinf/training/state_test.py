"""Hugging Face -> Megatron -> Hugging Face is exact in every layout, for weights and for what the optimizer holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from rlinf.errors import UserError
from rlinf.weights.tensor_folder import TensorFolder, open_hf_folder
from tests.training_ranks import build, merged, minibatches, numpy_dict, snapshot, update, whole_state

LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (3, 1, 1), (4, 2, 2), (4, 1, 4)]


def round_trip(at: Any, folder: Path) -> dict[str, Any]:
    engine = build(at, folder)
    state = {"model": numpy_dict(engine.export()), "param": numpy_dict(engine.export("param")), "again": numpy_dict(engine.export())}
    return state if at.dp_rank == at.tp_rank == 0 else {kind: {} for kind in state}


@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "llama", "llama-tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_round_trip_is_exact(rank_pool: Any, tiny_models: dict[str, Path], family: str, layout: tuple[int, int, int]) -> None:
    """The vocabulary of 131 is padded over two ranks: the padding never comes back."""
    file = load_file(tiny_models[family] / "model.safetensors")
    ranks = rank_pool.run(round_trip, tiny_models[family], ranks=layout[0], tp=layout[1], pp=layout[2])
    names = [name for rank in ranks for name in rank["model"]]
    assert len(names) == len(set(names))  # no stage exports what another one does: the tied copy stays at home
    for kind, tensors in merged(ranks).items():
        assert tensors.keys() == file.keys()
        assert all(np.array_equal(tensors[name], value) for name, value in file.items()), kind


def refill(at: Any, folder: Path) -> bool:
    """Train, export all state under HF names, fill a fresh engine with it: the same bits on every rank?"""
    import torch.distributed as dist

    engine = build(at, folder, precision="bf16")
    for mini in minibatches(engine):
        update(engine, mini)
    kinds = {kind: dict(engine.export(kind)) for kind in ("param", "exp_avg", "exp_avg_sq")}
    stages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, kinds)
    other = build(at, folder, precision="bf16")
    other.load_state(
        {kind: {n: t for stage in stages for n, t in stage[kind].items()} for kind in kinds}, engine.steps, engine.optimizer_state.steps()
    )
    same = snapshot(other) == snapshot(engine)
    return same


@pytest.mark.parametrize("layout", [(1, 1, 1), (3, 1, 1), (4, 2, 2), (4, 2, 1)])
def test_masters_and_moments_come_back_bit_for_bit(rank_pool: Any, tiny_models: dict[str, Path], layout: tuple[int, int, int]) -> None:
    assert all(rank_pool.run(refill, tiny_models["qwen2-tied"], ranks=layout[0], tp=layout[1], pp=layout[2]))


def state_before_a_step(at: Any, folder: Path) -> dict[str, Any]:
    engine = build(at, folder)
    state = whole_state(engine)
    steps = engine.optimizer_state.steps()
    (mini,) = minibatches(engine, n=1)
    update(engine, mini)
    twin = build(at, folder)
    update(twin, mini)
    same = snapshot(engine) == snapshot(twin)
    return {
        "moments": {k: float(sum(np.abs(v).sum() for v in state[k].values())) for k in ("exp_avg", "exp_avg_sq")},
        "steps": steps,
        "same": same,
    }


def test_moments_before_the_first_step_are_zero_and_looking_at_them_changes_nothing(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    for rank in rank_pool.run(state_before_a_step, tiny_models["llama"], ranks=4, tp=2):
        assert rank == {"moments": {"exp_avg": 0.0, "exp_avg_sq": 0.0}, "steps": 0, "same": True}


def adam_steps(at: Any, folder: Path) -> list[float]:
    """Adam's counts after a restore and one more step: one count for each parameter, none counted twice."""
    engine = build(at, folder)
    minis = minibatches(engine)
    update(engine, minis[0])
    engine.optimizer_state.restore_steps(7)
    update(engine, minis[1])
    counts = [s["step"].item() for s in engine.distributed.optimizer.state.values()]
    return counts


def test_every_parameter_has_its_own_step_count(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    for counts in rank_pool.run(adam_steps, tiny_models["llama"], ranks=4, tp=2, pp=2):
        assert counts and set(counts) == {8.0}


def missing(at: Any, folder: Path) -> str:
    whole = open_hf_folder(folder)
    with pytest.raises(UserError) as caught:
        engine = build(at, folder)
        engine.load_hf(TensorFolder(folder, {k: v for k, v in whole.files.items() if "layers.2.mlp.up" not in k}))
    return str(caught.value)


def test_a_missing_tensor_is_named(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    (message,) = rank_pool.run(missing, tiny_models["llama"], ranks=1)
    assert "no tensor named model.layers.2.mlp.up_proj.weight" in message and str(tiny_models["llama"]) in message


def gathered_in_pieces(at: Any, folder: Path) -> bool:
    from rlinf.training import state

    engine = build(at, folder)
    whole = dict(engine.export())
    default, state.GATHER_BYTES = state.GATHER_BYTES, 3000
    pieces = dict(engine.export())
    state.GATHER_BYTES = default
    return whole.keys() == pieces.keys() and all(torch.equal(whole[n], pieces[n]) for n in whole)


def test_the_size_of_a_gather_does_not_matter(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    assert all(rank_pool.run(gathered_in_pieces, tiny_models["qwen3"], ranks=4, tp=2, pp=2))
