"""Adapters by name: where they begin, in which shapes and layouts, and what a checkpoint's must agree with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlinf.config.schema import LORA_TARGETS, LoraConfig
from rlinf.errors import UserError
from rlinf.weights.adapters import FirstAdapters, merge, refuse_other_adapters, refuse_other_base, trained_shapes, what_binds, with_adapters
from rlinf.weights.architecture import Architecture
from rlinf.weights.mapping import adapted_matrix, adapter_rules, adapter_shapes, hf_shapes, to_hf, to_megatron

ARCH = Architecture("qwen2", 3, 16, 4, 2, 4, 24, 50, 1e-6, 1e4, 64, True, True, False)
LORA = LoraConfig(rank=3, alpha=6.0)


def test_every_matrix_of_the_layers_has_an_a_and_a_b_that_fit_it() -> None:
    shapes, whole = adapter_shapes(ARCH, 3, LORA_TARGETS), hf_shapes(ARCH)
    matrices = [n for n, s in whole.items() if "layers" in n and len(s) == 2]
    assert {adapted_matrix(n) for n in shapes} == set(matrices) and len(shapes) == 2 * len(matrices)
    for name in matrices:
        a, b = (shapes[name.removesuffix("weight") + f"lora_{x}.weight"] for x in "AB")
        assert (b[0], a[1]) == whole[name] and a[0] == b[1] == 3
    some = adapter_shapes(ARCH, 3, ["linear_qkv"])
    assert {n.split(".")[-3] for n in some} == {"q_proj", "k_proj", "v_proj"} and adapter_shapes(ARCH, 0, []) == {}


@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_cut_for_the_ranks_is_whole_again(tp: int) -> None:
    shapes = adapter_shapes(ARCH, 3, LORA_TARGETS)
    whole = {n: torch.randn(s) for n, s in shapes.items()}
    found = {}
    for rule in adapter_rules(ARCH, range(3), LORA_TARGETS):
        shards = [to_megatron(rule, [whole[n] for n in rule.hf], ARCH, tp, rank) for rank in range(tp)]
        assert rule.sharded or all(torch.equal(s, shards[0]) for s in shards)
        assert not rule.sharded or sum(s.numel() for s in shards) == sum(whole[n].numel() for n in rule.hf)
        found |= dict(to_hf(rule, shards, ARCH))
    assert found.keys() == whole.keys() and all(torch.equal(found[n], whole[n]) for n in whole)


def test_the_first_adapters_depend_on_seed_and_name_alone_and_add_nothing() -> None:
    first = FirstAdapters(adapter_shapes(ARCH, 3, LORA_TARGETS), 7)
    fewer, other = FirstAdapters(adapter_shapes(ARCH, 3, ["linear_fc2"]), 7), FirstAdapters(first.shapes, 8)
    for name, tensor in first.items():
        assert tuple(tensor.shape) == first.shapes[name]
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            bound = first.shapes[name][1] ** -0.5
            assert tensor.abs().max() <= bound and tensor.abs().max() > 0.8 * bound and abs(tensor.mean()) < 0.3 * bound
            assert not torch.equal(tensor, other[name])
    assert all(torch.equal(fewer[n], first[n]) for n in fewer)
    assert len({tuple(t[0].tolist()) for n, t in first.items() if ".lora_A." in n and t.shape[1] == 16}) == len(ARCH_INPUTS)


ARCH_INPUTS = [n for n, s in adapter_shapes(ARCH, 3, LORA_TARGETS).items() if ".lora_A." in n and s[1] == 16]


def test_given_adapters_are_taken_and_the_others_made() -> None:
    name = next(n for n in adapter_shapes(ARCH, 3, LORA_TARGETS) if ".lora_B." in n)
    given = {name: torch.ones(1), "model.norm.weight": torch.ones(16)}
    tensors = with_adapters(given, ARCH, LORA)
    assert tensors[name] is given[name] and tensors["model.norm.weight"] is given["model.norm.weight"]
    assert tensors.keys() == adapter_shapes(ARCH, 3, LORA_TARGETS).keys() | given.keys()


def test_merging_is_the_formula_rounded_once() -> None:
    w, a, b = torch.randn(5, 4).bfloat16(), torch.randn(3, 4).bfloat16(), torch.randn(5, 3).bfloat16()
    exact = w.double() + 2.0 * b.double() @ a.double()
    merged = merge(w, a, b, 2.0)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.float().bfloat16())


def test_what_is_trained_beside_adapters() -> None:
    assert trained_shapes(ARCH, LoraConfig(), "lm") == hf_shapes(ARCH)
    assert trained_shapes(ARCH, LORA, "lm") == adapter_shapes(ARCH, 3, LORA_TARGETS)
    assert trained_shapes(ARCH, LORA, "scalar").keys() - trained_shapes(ARCH, LORA, "lm").keys() == {"score.weight"}


@pytest.mark.parametrize(
    "other", [LoraConfig(), replace(LORA, rank=4), replace(LORA, alpha=7.0), replace(LORA, target_modules=["linear_qkv"])]
)
def test_other_adapters_do_not_go_on(other: LoraConfig) -> None:
    part = Path("/runs/a/checkpoints/step_000002/actor")
    state = {"lora": what_binds(LORA)}
    refuse_other_adapters(part, state, replace(LORA, seed=99, target_modules=LORA.target_modules[::-1]), "actor")
    refuse_other_adapters(part, {}, LoraConfig(), "actor")  # of a version that had no adapters
    for kept, now in ((state, other), ({"lora": what_binds(other)}, LORA)):
        with pytest.raises(UserError, match=r"actor.lora of .* and this run has .* set actor.lora as it was, or .*step_000002/hf"):
            refuse_other_adapters(part, kept, now, "actor")


def test_another_base_is_named() -> None:
    part, state = Path("/c/actor"), {"base": {"a": "1", "b": "2"}}
    refuse_other_base(part, state, {"b": "2"}, "rollout.model_dir")
    for found in ({"a": "1", "b": "3"}, {"b": "", "a": "1"}, {"c": "1"}):
        with pytest.raises(UserError, match=r"/c/actor: .* other weights than those of rollout.model_dir: tensor [bc] differs"):
            refuse_other_base(part, state, found, "rollout.model_dir")
