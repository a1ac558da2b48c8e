"""What one optimizer step does and does not change; numbers are compared with plain transformers by `rlinf check layout`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlinf.algorithms.importance import Correction
from rlinf.algorithms.objective import finalize_metrics
from rlinf.config.schema import OptimConfig
from tests.training_ranks import (
    OPTIM,
    PLAIN,
    VOCAB,
    build,
    checksums,
    logprobs,
    make_batch,
    minibatches,
    numpy_dict,
    snapshot,
    update,
    whole_state,
)

LAYOUTS = [(1, 1, 1), (3, 1, 1), (4, 2, 2)]  # ranks, TP, PP


def at_layout(ranks: int, tp: int, pp: int, cp: int = 1) -> dict[str, int]:
    return {"ranks": ranks, "tp": tp, "pp": pp, "cp": cp}


# ---- early stop ---------------------------------------------------------------------------------------------------------------------


def stopped_step(at: Any, folder: Path, precision: str, how: str) -> dict[str, Any]:
    """A good step, one that must be skipped, a good step; and beside it the same two good steps alone."""
    engine, twin = build(at, folder, precision=precision), build(at, folder, precision=precision)
    first, second = minibatches(engine)
    old = logprobs(engine, second[0])
    for e in (engine, twin):
        assert not update(e, first).skipped
    if old is not None:  # the ratio of the mini-batch's tokens is exceeded, or not a number, through one rank only
        if how == "ratio":
            old = [o - 4.0 for o in old]
        elif at.dp_rank == at.dp - 1 and at.tp_rank == 0:
            old[-1][torch.nonzero(second[0][-1].loss_mask_N)[0]] = float("nan")
        if how == "nan" and at.tp > 1:
            old = same_on_tensor_ranks(old)
    before = snapshot(engine)
    stopped = update(engine, second, old)
    untouched = snapshot(engine) == before
    again = [update(e, second) for e in (engine, twin)]
    out = {
        "skipped": stopped.skipped, "grad_norm": stopped.grad_norm, "untouched": untouched,
        "ratio": finalize_metrics(stopped.metrics.sums, stopped.metrics.maxima)["train/ratio"],
        "same as twin": snapshot(engine) == snapshot(twin) and again[0].learning_rate == again[1].learning_rate,
        "steps": engine.steps, "again": again[0].skipped,
    }  # fmt: skip
    return out


def same_on_tensor_ranks(values: list[torch.Tensor]) -> list[torch.Tensor]:
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    for v in values:
        dist.broadcast(v, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group())
    return values


@pytest.mark.parametrize("how", ["ratio", "nan"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("ranks", "tp", "pp"), LAYOUTS)
def test_a_mini_batch_far_off_policy_changes_nothing_on_any_rank(
    rank_pool: Any, tiny_models: dict[str, Path], ranks: int, tp: int, pp: int, precision: str, how: str
) -> None:
    for rank in rank_pool.run(stopped_step, tiny_models["qwen2-tied"], precision, how, **at_layout(ranks, tp, pp)):
        assert rank["skipped"] and rank["untouched"] and np.isnan(rank["grad_norm"])
        assert np.isnan(rank["ratio"]) if how == "nan" else rank["ratio"] > 5
        assert not rank["again"] and rank["steps"] == 2 and rank["same as twin"]


def gradient_of_nan(at: Any, folder: Path, precision: str) -> tuple[bool, bool, bool, float]:
    """The ratio is 1, but a token without rollout log-probability makes its importance weight, and so the gradient, NaN."""
    engine, twin = build(at, folder, precision=precision), build(at, folder, precision=precision)
    first, second = minibatches(engine)
    packs, denominators, _ = minibatches(engine)[0]
    if at.dp_rank == 0:
        packs[0].rollout_logprobs_N[:] = float("nan")
    before = snapshot(engine)
    done = engine.update(packs, None, None, denominators, replace(PLAIN, correction=Correction("token-truncate", 0.0, 2.0)), 5.0)
    untouched = snapshot(engine) == before
    for e in (engine, twin):
        update(e, first), update(e, second)
    same = snapshot(engine) == snapshot(twin)
    return done.skipped, untouched, same, done.grad_norm


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(rank_pool: Any, tiny_models: dict[str, Path], precision: str) -> None:
    for skipped, untouched, same, grad_norm in rank_pool.run(gradient_of_nan, tiny_models["qwen2-tied"], precision, ranks=4, pp=2):
        assert skipped and untouched and same and np.isnan(grad_norm)


def limits(at: Any, folder: Path) -> list[bool]:
    """Whether the same mini-batch is skipped under a limit below, above and without one."""
    engine = build(at, folder)
    (mini,) = minibatches(engine, n=1)
    old = [o - 1.0 for o in logprobs(engine, mini[0])]  # ratio e
    skipped = [update(engine, mini, old, limit).skipped for limit in (2.7, 2.8, None)]
    return skipped


def test_the_limit_is_on_the_token_mean_ratio(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    # the second call is skipped or not by the weights before it: the first one changed nothing
    assert rank_pool.run(limits, tiny_models["llama"], ranks=1)[0][:2] == [True, False]
    assert rank_pool.run(limits, tiny_models["llama"], ranks=1)[0][2] is False


# ---- precision ----------------------------------------------------------------------------------------------------------------------


def tiny_rate(at: Any, folder: Path, steps: int) -> dict[str, Any]:
    engine = build(at, folder, OptimConfig(lr=1e-6, adam_eps=1e-12, weight_decay=0.0), precision="bf16")
    start = whole_state(engine)
    minis = minibatches(engine)
    rounding = []
    for i in range(steps):
        assert not update(engine, minis[i % 2]).skipped
        state = whole_state(engine)
        rounding.append(
            all(np.array_equal(torch.from_numpy(m).bfloat16().float().numpy(), state["model"][n]) for n, m in state["param"].items())
        )
    return {"start": start, "end": whole_state(engine), "rounding": all(rounding)}


def test_fp32_masters_accumulate_what_bf16_weights_cannot_hold(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    from safetensors.numpy import load_file

    (got,) = rank_pool.run(tiny_rate, tiny_models["qwen2"], 6, ranks=1)
    file = load_file(tiny_models["qwen2"] / "model.safetensors")
    assert got["rounding"]  # after every step the model is the rounding of the masters
    assert all(np.array_equal(got["start"]["param"][name], value) for name, value in file.items())  # not of the rounded model
    name = "model.layers.1.mlp.up_proj.weight"
    moved = np.abs(got["end"]["param"][name] - got["start"]["param"][name])
    assert 1e-6 < np.median(moved) < 6.5e-6  # six steps of at most about lr
    changed = (got["end"]["model"][name] != got["start"]["model"][name]).mean()
    assert changed < 0.05  # bf16 keeps 8 bits: a weight of 0.1 does not see 1e-6


def half_precision(at: Any, folder: Path, scale: float) -> dict[str, Any]:
    engine = build(at, folder, replace(OPTIM, initial_loss_scale=scale, loss_scale_window=2), precision="fp16")
    (mini,) = minibatches(engine, n=1)
    before, history = snapshot(engine), []
    for _ in range(40):
        done = update(engine, mini)
        now = snapshot(engine)
        changed = sorted(k for k in now if now[k] != before.get(k))
        history.append((done.skipped, engine.loss_scaler()["scale"], changed, done.grad_norm, done.loss_scale))
        before = now
        if engine.steps == 3:
            break
    return {"history": history, "steps": engine.steps}


def test_fp16_overflow_lowers_the_loss_scale_and_steps_nothing(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    for rank in rank_pool.run(half_precision, tiny_models["llama"], 2.0**30, **at_layout(4, 2, 2)):
        history = rank["history"]
        overflows = [h for h in history if h[0]]
        assert overflows and rank["steps"] == 3
        assert all(changed == ["scaler"] for _, _, changed, _, _ in overflows)
        assert overflows[-1][1] < 2.0**30 and history[-1][1] >= overflows[-1][1]
        assert all(np.isfinite(norm) for skipped, _, _, norm, _ in history if not skipped)
        scales = [2.0**30, *(after for _, after, *_ in history)]
        assert [used for *_, used in history] == scales[:-1]  # a step reports the scale that it ran with


def fixed_scale(at: Any, folder: Path, scale: float) -> tuple[list[bool], list[float], bool]:
    """Three steps with a static loss scale; whether they end where a dynamic one that starts there and does not move ends."""
    fixed, dynamic = (
        build(at, folder, replace(OPTIM, **how), precision="fp16") for how in ({"loss_scale": scale}, {"initial_loss_scale": scale})
    )
    minis, skipped, scales = minibatches(fixed), [], []
    for i in range(3):
        done = update(fixed, minis[i % 2])
        update(dynamic, minis[i % 2])
        skipped.append(done.skipped), scales.append(done.loss_scale)
    a, b = snapshot(fixed), snapshot(dynamic)
    return skipped, scales, a | {"scaler": b""} == b | {"scaler": b""}


def test_a_static_loss_scale_stays_and_an_overflow_steps_nothing(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    for skipped, scales, same in rank_pool.run(fixed_scale, tiny_models["llama"], 1024.0, **at_layout(2, 2, 1)):
        assert skipped == [False] * 3 and scales == [1024.0] * 3 and same
    for skipped, scales, _ in rank_pool.run(fixed_scale, tiny_models["llama"], 2.0**40, **at_layout(2, 2, 1)):
        assert skipped == [True] * 3 and scales == [2.0**40] * 3


def half_and_single(at: Any, folder: Path) -> list[float]:
    norms = []
    for precision in ("fp32", "fp16"):
        engine = build(at, folder, replace(OPTIM, initial_loss_scale=1024.0), precision=precision)
        (mini,) = minibatches(engine, n=1)
        norms.append(update(engine, mini).grad_norm)
    return norms


def test_the_loss_scale_is_taken_out_of_the_gradient(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    single, half = rank_pool.run(half_and_single, tiny_models["llama"], ranks=1)[0]
    assert half == pytest.approx(single, rel=0.02)


# ---- optimizer ----------------------------------------------------------------------------------------------------------------------


def decay_only(at: Any, folder: Path) -> dict[str, np.ndarray]:
    engine = build(at, folder, OptimConfig(lr=0.5, weight_decay=0.1, clip_grad=1.0))
    batch = make_batch(VOCAB)
    (packs, denominators, _), *_ = minibatches(
        engine, n=1, batch=replace(batch, advantages=tuple(np.zeros_like(a) for a in batch.advantages))
    )
    engine.update(packs, None, None, denominators, replace(PLAIN, entropy_bonus=0.0), None)
    return numpy_dict(engine.export())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_weights_decay_but_norms_and_biases_do_not(rank_pool: Any, tiny_models: dict[str, Path], family: str) -> None:
    from safetensors.numpy import load_file

    (after,) = rank_pool.run(decay_only, tiny_models[family], ranks=1)
    for name, before in load_file(tiny_models[family] / "model.safetensors").items():
        if before.ndim == 2:
            np.testing.assert_allclose(after[name], before * np.float32(0.95), rtol=1e-6, err_msg=name)
        else:
            assert np.array_equal(after[name], before), name


def clipped(at: Any, folder: Path, bound: float) -> tuple[float, float]:
    engine = build(at, folder, replace(OPTIM, adam_beta1=0.0, clip_grad=bound))
    (mini,) = minibatches(engine, n=1)
    norm = update(engine, mini).grad_norm
    used = numpy_dict(engine.export("exp_avg"))  # beta1 is 0: the gradient as the optimizer saw it
    return norm, float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in used.values())))


def test_the_norm_is_reported_before_clipping_and_zero_means_no_clipping(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    norm, used = rank_pool.run(clipped, tiny_models["llama"], 0.0, ranks=1)[0]
    assert used == pytest.approx(norm, rel=1e-6) and norm > 0.2
    norm_again, bounded = rank_pool.run(clipped, tiny_models["llama"], 0.1, ranks=1)[0]
    assert norm_again == norm and bounded == pytest.approx(0.1, rel=1e-4)


def schedule(at: Any, folder: Path) -> list[float]:
    engine = build(at, folder, replace(OPTIM, lr=1.0, lr_warmup_steps=4))
    first, second = minibatches(engine)
    old = [o - 9.0 for o in logprobs(engine, first[0])]
    rates = [update(engine, first).learning_rate, update(engine, first, old).learning_rate, update(engine, second).learning_rate]
    return rates


def test_the_learning_rate_counts_optimizer_steps_not_mini_batches(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    assert rank_pool.run(schedule, tiny_models["llama"], ranks=1)[0] == [0.25, 0.5, 0.5]  # the second was skipped: its rate comes again


# ---- on-policy ----------------------------------------------------------------------------------------------------------------------


def on_policy(at: Any, folder: Path, precision: str, recomputed: bool, model: dict[str, Any]) -> dict[str, float]:
    engine = build(at, folder, precision=precision, **model)
    first, second = minibatches(engine, budget=30)
    update(engine, first)
    old = logprobs(engine, second[0]) if recomputed else None
    metrics = update(engine, second, old).metrics
    return finalize_metrics(metrics.sums, metrics.maxima)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize(("layout", "model"), [((1, 1, 1), {}), ((4, 2, 2), {"sequence_parallel": True}), ((4, 1, 2, 2), {})])
def test_on_policy_the_ratio_is_exactly_one(
    rank_pool: Any, tiny_models: dict[str, Path], precision: str, recomputed: bool, layout: tuple[int, ...], model: dict[str, Any]
) -> None:
    """Recomputed log-probabilities are those of the update's own forward pass, bit for bit."""
    for metrics in rank_pool.run(on_policy, tiny_models["qwen3"], precision, recomputed, model, **at_layout(*layout)):
        assert metrics["train/ratio"] == 1.0 and metrics["train/approx_kl"] == 0.0
        assert metrics["train/clip_fraction"] == metrics["train/dual_clip_fraction"] == 0.0
        assert metrics["train/tokens"] > 10


def agreement(at: Any, folder: Path, shift: int) -> float:
    """Largest gap between the actor and a rollout engine that computes the same, its log-probabilities shifted by some tokens."""
    engine = build(at, folder)
    packs, denominators, _ = minibatches(engine, n=1)[0]
    for batch, values in zip(packs, logprobs(engine, packs)):
        batch.rollout_logprobs_N = values.roll(shift)
    gap = update(engine, (packs, denominators, len(packs))).metrics.maxima["gap"].item()
    return gap


def test_rollout_logprobs_shifted_by_one_token_are_seen(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    assert rank_pool.run(agreement, tiny_models["qwen2"], 0, ranks=1) == [0.0]
    assert rank_pool.run(agreement, tiny_models["qwen2"], 1, ranks=1)[0] > 0.5


# ---- groups without a gradient ------------------------------------------------------------------------------------------------------


def with_and_without(at: Any, folder: Path, equal: tuple[int, ...]) -> list[tuple[dict[str, float], dict[str, np.ndarray], list[int]]]:
    """Metrics, gradients (beta1 is 0) and rows that had a backward pass, with one for every group and with none for the `equal` ones."""
    batch, found = make_batch(VOCAB), []
    advantages = tuple(a * (g not in equal) for g, a in enumerate(batch.advantages))
    for zero_teaches in (True, False):
        engine = build(at, folder, replace(OPTIM, adam_beta1=0.0))
        minis = minibatches(engine, batch=replace(batch, advantages=advantages), zero_teaches=zero_teaches)
        rows = sum(len(b.token_ids) for packs, _, teaching in minis for b in packs[:teaching])
        old, metrics, gradients = [None, logprobs(engine, minis[1][0])], [], {}
        for i, (packs, denominators, teaching) in enumerate(minis):
            done = engine.update(packs, old[i], None, denominators, replace(PLAIN, entropy_bonus=0.0), 5.0, teaching)
            metrics.append(finalize_metrics(done.metrics.sums, done.metrics.maxima) | {"norm": done.grad_norm, "seen": len(done.logprobs)})
            gradients |= {f"{i} {name}": g for name, g in numpy_dict(engine.export("exp_avg")).items()}
        found.append((metrics, gradients, rows))
    return found


@pytest.mark.parametrize("equal", [(1, 4), (0, 1, 2), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("layout", [(1, 1, 1), (3, 1, 1), (4, 2, 2), (2, 1, 1, 2)])
def test_what_has_no_gradient_is_seen_but_not_differentiated(
    rank_pool: Any, tiny_models: dict[str, Path], layout: tuple[int, ...], equal: tuple[int, ...]
) -> None:
    everything, teaching = 0, 0
    for (metrics, gradients, rows), (same_metrics, same_gradients, fewer) in rank_pool.run(
        with_and_without, tiny_models["qwen2-tied"], equal, **at_layout(*layout)
    ):
        everything, teaching = everything + rows, teaching + fewer
        for a, b in zip(metrics, same_metrics, strict=True):
            seen = a.pop("seen"), b.pop("seen")
            assert seen[0] > 0 and seen[1] > 0 or layout[2] > 1
            assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(same_gradients[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    assert teaching < everything


# ---- activation recompute -----------------------------------------------------------------------------------------------------------


def gradients(at: Any, folder: Path, model: dict[str, Any]) -> tuple[dict[str, np.ndarray], float]:
    engine = build(at, folder, replace(OPTIM, adam_beta1=0.0, clip_grad=0.0), **model)
    norms = [update(engine, mini).grad_norm for mini in minibatches(engine)]
    grads = numpy_dict(engine.export("exp_avg"))
    return grads, sum(norms)


RECOMPUTE = {
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize("layout", [(1, 1, 1), (4, 2, 2)])
def test_activation_recompute_gives_the_same_gradients(
    rank_pool: Any, tiny_models: dict[str, Path], how: str, layout: tuple[int, int, int]
) -> None:
    sp = {"sequence_parallel": True} if layout[1] > 1 else {}
    plain = rank_pool.run(gradients, tiny_models["qwen2-tied"], sp, **at_layout(*layout))
    saved = rank_pool.run(gradients, tiny_models["qwen2-tied"], RECOMPUTE[how] | sp, **at_layout(*layout))
    for (a, norm_a), (b, norm_b) in zip(plain, saved):
        assert norm_a == norm_b and a.keys() == b.keys()
        for name in a:
            assert np.array_equal(a[name], b[name]), name


# ---- copies -------------------------------------------------------------------------------------------------------------------------


def after_steps(at: Any, folder: Path, precision: str) -> dict[str, str]:
    engine = build(at, folder, precision=precision)
    for _ in range(3):
        for mini in minibatches(engine):
            update(engine, mini)
    return checksums(engine)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [(4, 2, 2), (4, 1, 2), (3, 1, 1), (4, 1, 2, 2)])
def test_tied_embeddings_and_replicas_stay_equal(
    rank_pool: Any, tiny_models: dict[str, Path], precision: str, layout: tuple[int, ...]
) -> None:
    seen: dict[str, str] = {}
    ranks = rank_pool.run(after_steps, tiny_models["qwen2-tied"], precision, **at_layout(*layout))
    assert sum("model.embed_tokens.weight#0" in rank for rank in ranks) == (layout[0] // layout[1] if layout[2] < 3 else 2)
    for rank in ranks:
        for name, value in rank.items():
            assert seen.setdefault(name, value) == value, name


def threads_of_a_dropped_engine(at: Any, folder: Path) -> int:
    engine = build(at, folder)
    assert not update(engine, minibatches(engine)[0]).skipped
    return len(os.listdir("/proc/self/task"))


def test_a_dropped_engine_leaves_no_process_groups(rank_pool: Any, tiny_models: dict[str, Path]) -> None:
    """Each group of gloo has a thread that wakes up a hundred times a second."""
    layouts = [(2, 2, 1), (2, 1, 2), (2, 1, 1)]
    rounds = [
        [rank_pool.run(threads_of_a_dropped_engine, tiny_models["qwen2"], **at_layout(*layout)) for layout in layouts] for _ in range(2)
    ]
    assert rounds[0] == rounds[1]
