"""`rlinf check layout` holds, and it fails when something is wrong: faults are planted in the ranks by replacing functions there."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlinf.algorithms.aggregation import Denominators
from rlinf.checks import layout
from rlinf.checks.layout import Case, Finding, check_cases, make_cases
from rlinf.checks.layout_reference import make_batch
from rlinf.checks.rank_pool import RankPool
from rlinf.checks.tiny_model import FAMILIES, VOCAB

EVERY_MATRIX = next(iter(layout.ADAPTED))
Patch = Callable[[Any, str, Any], None]
ROOT = Path(__file__).resolve().parents[2]
_undo: list[tuple[Any, str, Any]] = []  # in a rank: what plant() replaced


def plant(at: Any, name: str) -> None:
    """In a rank: from now on this fault is there."""

    def patch(owner: Any, attribute: str, value: Any) -> None:
        _undo.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    FAULTS[name][0](patch)


def heal(at: Any) -> None:
    """In a rank: everything as it was."""
    while _undo:
        setattr(*_undo.pop())


def mean_of_means(patch: Patch) -> None:
    from rlinf.training import engine

    objective, update = engine.policy_objective, engine.MegatronEngine.update

    def with_local_means(self: Any, batches: Any, *rest: Any) -> Any:
        parts = len(batches) * self.at.dp
        engine.policy_objective = lambda tokens, _, s: objective(tokens, Denominators(int(tokens.loss_mask_N.sum()) * parts, 1), s)
        return update(self, batches, *rest)

    patch(engine, "policy_objective", objective)  # so that it is restored
    patch(engine.MegatronEngine, "update", with_local_means)


def norm_gradient_not_reduced(patch: Patch) -> None:
    from rlinf.training.model import RMSNorm

    init = RMSNorm.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    patch(RMSNorm, "__init__", unmarked)


def qk_norm_gradient_not_reduced(patch: Patch) -> None:
    from megatron.core.distributed import finalize_model_grads

    patch(sys.modules[finalize_model_grads.__module__], "_allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None)


def tied_gradient_not_summed(patch: Patch) -> None:
    from megatron.core.distributed import finalize_model_grads

    patch(sys.modules[finalize_model_grads.__module__], "_allreduce_word_embedding_grads", lambda *_, **__: None)


def averaged_over_ranks(patch: Patch) -> None:
    from rlinf.training import engine

    config = engine.transformer_config

    def averaging(*args: Any) -> Any:
        made = config(*args)
        made.calculate_per_token_loss = False
        return made

    patch(engine, "transformer_config", averaging)


def shifted_logprob(patch: Patch) -> None:
    from rlinf.training import model

    logprobs = model.target_logprobs
    patch(model, "target_logprobs", lambda hidden, weight, targets, **kw: logprobs(hidden.roll(-1, 0), weight, targets, **kw))


def prefix_attended_twice(patch: Patch) -> None:
    from rlinf.training.attention import PackedAttention

    responses = PackedAttention._responses
    twice = lambda t: torch.cat([t, t])
    patch(PackedAttention, "_responses", lambda self, q, k, v, pk, pv, segment: responses(self, q, k, v, twice(pk), twice(pv), segment))


def prefix_gradient_twice(patch: Patch) -> None:
    from rlinf.training.attention import PackedAttention

    responses = PackedAttention._responses
    doubled = lambda t: 2 * t - t.detach()  # the same value, twice the gradient
    patch(PackedAttention, "_responses", lambda self, q, k, v, pk, pv, segment: responses(self, q, k, v, doubled(pk), doubled(pv), segment))


def value_read_one_row_late(patch: Patch) -> None:
    from rlinf.training.model import PackedModel

    values = PackedModel._values
    patch(PackedModel, "_values", lambda self, hidden, batch: values(self, hidden.roll(-1, 0), batch))


def value_gradient_summed_over_tensor_ranks(patch: Patch) -> None:
    from rlinf.training import model

    gather = model.gather_from_sequence_parallel_region
    patch(model, "gather_from_sequence_parallel_region", lambda hidden, **_: gather(hidden, tensor_parallel_output_grad=True))


def adapter_gradient_not_reduced(patch: Patch) -> None:
    from rlinf.training.adapters import Adapter

    init = Adapter.__init__

    def unmarked(self: Any, *args: Any) -> None:
        init(self, *args)
        self.a.sequence_parallel = self.b.sequence_parallel = False

    patch(Adapter, "__init__", unmarked)


def adapter_of_another_part(patch: Patch) -> None:
    from rlinf.training.adapters import Adapter

    patch(Adapter, "wide_b", lambda self: (self.part_of.roll(1, 1)[:, :, None] * self.b[:, None, :]).flatten(1))


def router_gradient_not_reduced(patch: Patch) -> None:
    from rlinf.training.experts import ExpertsMLP

    init = ExpertsMLP.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.router.sequence_parallel = False

    patch(ExpertsMLP, "__init__", unmarked)


def router_sees_its_own_experts_alone(patch: Patch) -> None:
    from rlinf.training import experts

    enter = experts.copy_to_tensor_model_parallel_region
    patch(experts, "copy_to_tensor_model_parallel_region", lambda t: t if t.shape[1] == 8 else enter(t))  # logits: 8 experts


def weights_of_other_experts(patch: Patch) -> None:
    from rlinf.training import experts

    def reversed_weights(*args: Any) -> Any:
        weights, chosen = route(*args)
        return weights.flip(1), chosen

    route = experts.route
    patch(experts, "route", reversed_weights)


def shards_not_marked(patch: Patch) -> None:
    from rlinf.training import engine

    make = engine.get_megatron_optimizer

    def unmarked(config: Any, chunks: Any) -> Any:
        for param in chunks[0].parameters():
            param.tensor_model_parallel = False
        return make(config, chunks)

    patch(engine, "get_megatron_optimizer", unmarked)


def biased_data_parallel_share(patch: Patch) -> None:
    build = layout.build_rank_batches
    patch(layout, "build_rank_batches", lambda *args, **kw: [build(*args, **kw)[0]] * kw["dp"])


def chunks_in_the_order_of_the_ranks(patch: Patch) -> None:
    from rlinf.training import context

    def as_they_come(ctx: Any, rows: torch.Tensor, group: Any) -> torch.Tensor:
        size = torch.distributed.get_world_size(group)
        ctx.group, ctx.order = group, list(range(2 * size))
        by_rank = rows.new_empty(size * len(rows), *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(by_rank, rows.contiguous(), group=group)
        return by_rank

    patch(context._GatherRows, "forward", staticmethod(as_they_come))


def gradients_of_gathered_keys_not_summed(patch: Patch) -> None:
    from rlinf.training import context

    def own_queries_only(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        parts, rank = grad.chunk(len(ctx.order)), torch.distributed.get_rank(ctx.group)
        return torch.cat([parts[chunk] for chunk in ctx.order[2 * rank : 2 * rank + 2]]), None

    patch(context._GatherRows, "backward", staticmethod(own_queries_only))


# fault -> (how to plant it, a layout in which it must show, the figure that shows it)
FAULTS: dict[str, tuple[Callable[[Patch], None], Case, str]] = {
    "mean of means over micro-batches": (mean_of_means, Case(1, 1, 1, False, "qwen2", 24, True, 0), "loss"),
    "a norm's gradient not reduced under sequence parallelism": (
        norm_gradient_not_reduced, Case(2, 2, 1, True, "qwen2", 512, True, 0), "gradient"
    ),
    "a query norm's gradient not reduced over tensor-parallel ranks": (
        qk_norm_gradient_not_reduced, Case(2, 2, 1, False, "qwen3", 512, True, 0), "gradient"
    ),
    "a tied embedding's gradient not summed over stages": (
        tied_gradient_not_summed, Case(2, 1, 2, False, "qwen2-tied", 512, True, 0), "gradient"
    ),
    "gradients averaged over data-parallel ranks": (averaged_over_ranks, Case(2, 1, 1, False, "qwen2", 512, True, 0), "gradient"),
    "every data-parallel rank trains on the first one's samples": (
        biased_data_parallel_share, Case(2, 1, 1, False, "qwen2", 512, True, 0), "loss"
    ),
    "a log-probability taken one position too late": (shifted_logprob, Case(1, 1, 1, False, "llama", 512, False, 0), "metric"),
    "a shared prefix attended to twice": (prefix_attended_twice, Case(1, 1, 1, False, "llama", 512, True, 0), "metric"),
    "a shared prefix whose gradient counts twice": (prefix_gradient_twice, Case(1, 1, 1, False, "llama", 512, True, 0), "gradient"),
    "a value read one position too late": (value_read_one_row_late, Case(1, 1, 1, False, "llama", 512, False, 0, "scalar"), "metric"),
    "a value's gradient summed over tensor-parallel ranks": (
        value_gradient_summed_over_tensor_ranks, Case(2, 2, 1, True, "qwen2-tied", 512, True, 0, "scalar"), "gradient"
    ),
    "keys of context-parallel ranks in the wrong order": (
        chunks_in_the_order_of_the_ranks, Case(2, 1, 1, False, "llama", 512, False, 0, cp=2), "metric"
    ),
    "gradients of gathered keys not summed": (
        gradients_of_gathered_keys_not_summed, Case(2, 1, 1, False, "qwen2", 512, True, 0, cp=2), "gradient"
    ),
    "adapters' gradients not summed over tensor-parallel ranks": (
        adapter_gradient_not_reduced, Case(2, 2, 1, True, "qwen2", 512, True, 0, adapters=EVERY_MATRIX), "gradient"
    ),
    "the adapter of another matrix": (
        adapter_of_another_part, Case(2, 2, 1, False, "qwen2", 512, True, 0, adapters=EVERY_MATRIX), "metric"
    ),
    "a router's gradient not summed over its shares of the rows": (
        router_gradient_not_reduced, Case(2, 2, 1, True, "qwen3-moe", 512, True, 0), "gradient"
    ),
    "a router that learns from its own rank's experts alone": (
        router_sees_its_own_experts_alone, Case(2, 2, 1, False, "qwen3-moe", 512, True, 0), "gradient"
    ),
    "experts weighted as others": (weights_of_other_experts, Case(2, 2, 1, False, "qwen3-moe", 512, True, 0), "metric"),
    "sharded parameters not marked for the gradient norm": (shards_not_marked, Case(2, 2, 1, False, "qwen2", 512, True, 0), "norm"),
}  # fmt: skip


def bound(figure: str) -> float:
    return getattr(
        layout, {"weight": "WEIGHT", "metric": "METRIC", "norm": "NORM", "gradient": "GRADIENT", "loss": "LOSS"}[figure] + "_TOLERANCE"
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_makes_the_check_fail(fault: str, rank_pool: RankPool, tmp_path: Path) -> None:
    _, case, figure = FAULTS[fault]
    at = {"ranks": case.ranks, "tp": case.tp, "pp": case.pp, "cp": case.cp}
    (sound,) = check_cases(rank_pool, [case], tmp_path)
    assert sound.holds, layout.complaint(sound)
    rank_pool.run(plant, fault, **at)
    (broken,) = check_cases(rank_pool, [case], tmp_path)
    rank_pool.run(heal, **at)
    assert not broken.holds
    assert getattr(broken, figure) > 10 * bound(figure), layout.complaint(broken)


def test_the_norm_fault_is_seen_by_the_norm_alone(rank_pool: RankPool, tmp_path: Path) -> None:
    """The gradients are right; only their reported norm is not: no other figure would show it."""
    case = FAULTS["sharded parameters not marked for the gradient norm"][1]
    rank_pool.run(plant, "sharded parameters not marked for the gradient norm", ranks=2, tp=2)
    (broken,) = check_cases(rank_pool, [case], tmp_path)
    rank_pool.run(heal, ranks=2, tp=2)
    assert broken.norm > 1e-3 and all(getattr(broken, f) <= bound(f) for f in ("loss", "gradient", "weight", "metric"))


@pytest.mark.slow
def test_quick_check_holds_and_reports(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case of each family; the test of the whole command has them all."""
    monkeypatch.setattr(layout, "RankPool", lambda size: nullcontext(rank_pool))
    quick = layout.make_cases(True)
    chosen = [next(case for case in quick[i:] + quick if case.family == family) for i, family in enumerate(FAMILIES)]
    monkeypatch.setattr(layout, "make_cases", lambda quick: chosen)
    assert len(quick) == 3 * len(layout.LAYOUTS + layout.CONTEXT_LAYOUTS) and layout.main(quick=True, json_file=tmp_path / "out.json") == 0
    out = capsys.readouterr().out
    assert f"{len(FAMILIES)} of {len(FAMILIES)} layouts hold" in out and "FAILS" not in out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["holds"] and {v["case"]["family"] for v in report["layouts"]} == set(FAMILIES)
    assert all(v["gradient"] <= report["tolerances"]["gradient"] for v in report["layouts"])


def test_a_failing_layout_is_described_and_gives_exit_code_1(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layout, "RankPool", lambda size: nullcontext(rank_pool))
    monkeypatch.setattr(layout, "make_cases", lambda quick: [Case(1, 1, 1, False, "llama", 512, True, 0)])
    rank_pool.run(plant, "a shared prefix attended to twice", ranks=1)
    assert layout.main(quick=True, json_file=None) == 1
    rank_pool.run(heal, ranks=1)
    out = capsys.readouterr().out
    assert "FAILS" in out and "llama TP1 PP1 DP1, shared prefix" in out and "0 of 1 layouts hold" in out


def test_the_cases_cover_every_dimension() -> None:
    cases = make_cases()
    assert len(cases) == len(set(cases)) >= 40
    for family in FAMILIES:
        mine = [c for c in cases if c.family == family and c.head == "lm" and not c.adapters]
        assert {(c.ranks, c.tp, c.pp) for c in mine} >= {(1, 1, 1), (2, 2, 1), (2, 1, 2), (3, 1, 1), (4, 2, 2), (4, 1, 4), (4, 1, 1)}
        assert {(c.budget, c.share_prefix) for c in mine} == {(b, p) for b, p, _ in layout.SPLITS}
        assert {c.order for c in mine} == {o for _, _, o in layout.SPLITS} and {c.sequence_parallel for c in mine} == {True, False}
        assert {c.recompute for c in mine} == set(layout.RECOMPUTE)
    for recompute in layout.RECOMPUTE:
        mine = [c for c in cases if c.recompute == recompute]
        assert {(c.pp > 1, c.sequence_parallel) for c in mine} == {(a, b) for a in (True, False) for b in (True, False)} and {
            c.head for c in mine
        } == {"lm", "scalar"}
    assert {c.dp for c in cases} == {1, 2, 3, 4} and {c.tp for c in cases} == {1, 2, 4}
    layouts = {(*l, 1) for l in layout.LAYOUTS} | set(layout.CONTEXT_LAYOUTS)
    assert len(make_cases(quick=True)) == 3 * len(layouts)
    adapted = [c for c in cases if c.adapters]
    assert {(c.ranks, c.tp, c.pp, c.sequence_parallel, c.cp) for c in adapted} == layouts and {c.family for c in adapted} == set(FAMILIES)
    assert {c.adapters for c in adapted} == set(layout.ADAPTED) - {()} and {c.head for c in adapted} == {"lm", "scalar"}
    assert {c.recompute for c in adapted if c.pp == 1} == set(layout.RECOMPUTE)  # the first stage: nothing in front of it is trained
    critics = [c for c in cases if c.head == "scalar" and not c.adapters]
    assert {(c.ranks, c.tp, c.pp, c.sequence_parallel, c.cp) for c in critics} == layouts and {c.family for c in critics} == set(FAMILIES)
    assert {(c.budget, c.share_prefix) for c in critics} == {(b, p) for b, p, _ in layout.SPLITS}
    context = [c for c in cases if c.cp > 1 and not c.adapters]
    assert {(c.ranks, c.tp, c.pp, c.sequence_parallel, c.cp) for c in context if c.head == "lm"} == set(layout.CONTEXT_LAYOUTS)
    assert (
        {c.family for c in context} == set(FAMILIES)
        and {c.share_prefix for c in context} == {True, False}
        and {c.recompute for c in context} == set(layout.RECOMPUTE)
    )
    counts = [micro_batches(c) for c in cases]
    assert any(len(set(of_ranks)) > 1 for of_ranks in counts)  # a rank that has less to do than another
    assert any(set(of_ranks) == {2} for of_ranks in counts) and any(min(of_ranks) > 7 for of_ranks in counts)


def micro_batches(case: Case) -> list[int]:
    """Of every rank, in both mini-batches."""
    batch = make_batch(VOCAB)
    headers = [g.header() for g in batch.groups]
    ranks = layout.build_rank_batches(
        headers, batch.advantages, dp=case.dp, n_minibatches=2, max_tokens=case.budget, share_prefix=case.share_prefix
    )
    return [sum(len(mini.micro_batches) for mini in rank.mini_batches) for rank in ranks]


def test_the_batch_has_the_awkward_cases() -> None:
    batch = make_batch(VOCAB)
    samples = [s for g in batch.groups for s in g.samples]
    assert (
        any(len(s) == 1 for s in samples)
        and any(s.loss_mask.sum() == 0 for s in samples)
        and any(len(g.samples) == 1 for g in batch.groups)
    )
    first, second = (sum(len(g.samples) for g in groups) for groups, _ in batch.minibatches)
    assert first == second  # build_rank_batches cuts mini-batches by sample count: here on the groups' border
    shuffled = batch.shuffled(1)
    advantage = lambda b: {s.sample_id: float(a) for g, group in zip(b.groups, b.advantages) for s, a in zip(g.samples, group)}
    assert advantage(shuffled) == advantage(batch) and [g.group_id for g in shuffled.groups] != [g.group_id for g in batch.groups]
    for (a, _), (b, _) in zip(batch.minibatches, shuffled.minibatches):
        assert {g.group_id for g in a} == {g.group_id for g in b}


def test_deviations_never_overlook_a_missing_tensor_or_nan() -> None:
    want = {"a": np.ones(4, np.float32), "b": np.full(4, 1e-9, np.float32)}
    assert layout.worst(layout.deviations({"a": want["a"]}, want, want)) == (math.inf, "b")
    bad = layout.worst(layout.deviations({"a": want["a"] * np.nan, "b": want["b"]}, want, want))
    assert math.isnan(bad[0]) and bad[1] == "a"
    finding = Finding(make_cases()[0], 1, 0.0, float("nan"), "a", 0.0, 0.0, "", 0.0, "", True, 0.0)
    assert not finding.holds
    # a tensor with hardly any gradient is measured against the gradient of all
    noisy = layout.deviations({"a": want["a"], "b": want["b"] + np.float32(1e-9)}, want, want)
    assert layout.worst(noisy)[0] == pytest.approx(1e-6, rel=0.01)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout_and_family=st.sampled_from(
        [
            ((1, 1, 1, False), "qwen2-tied", 1),
            ((2, 1, 1, False), "qwen3", 1),
            ((2, 2, 1, True), "llama", 1),
            ((3, 1, 1, False), "qwen2", 1),
            ((2, 1, 2, False), "llama-tied", 1),
            ((4, 2, 2, True), "qwen3-tied", 1),
            ((2, 1, 1, False), "qwen3", 2),
            ((4, 2, 1, True), "qwen2", 2),
        ]
    ),
    budget=st.integers(1, 120),
    share_prefix=st.booleans(),
    order=st.integers(0, 10_000),
    head=st.sampled_from(["lm", "scalar"]),
    recompute=st.sampled_from(sorted(layout.RECOMPUTE)),
    adapters=st.sampled_from(sorted(layout.ADAPTED)),
)
def test_loss_metrics_and_gradients_do_not_depend_on_the_split(
    rank_pool: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    layout_and_family: Any,
    budget: int,
    share_prefix: bool,
    order: int,
    head: str,
    recompute: str,
    adapters: tuple[str, ...],
) -> None:
    where, family, cp = layout_and_family
    (finding,) = check_cases(
        rank_pool,
        [Case(*where, family, budget, share_prefix, order, head, recompute, cp, adapters)],
        tmp_path_factory.getbasetemp() / "drawn",
    )
    assert finding.holds, layout.complaint(finding)


@pytest.mark.slow
def test_the_command_proves_all_layouts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlinf", "check", "layout", "--json", str(tmp_path / "out.json")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report, after = json.loads((tmp_path / "out.json").read_text()), resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(report["layouts"]) >= 40 and report["holds"]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2 * 360  # six minutes of two cores; other tests may have the second
