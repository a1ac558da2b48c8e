"""HF -> Megatron shards -> HF gives back every bit, for every family, layout and TP size."""

import pytest
import torch

from rlinf.weights.architecture import Architecture
from rlinf.weights.mapping import hf_shapes, model_rules, to_hf, to_megatron

SHAPE = dict(n_layers=3, hidden=32, n_heads=8, n_kv_heads=4, head_dim=6, ffn=40, vocab=51, norm_eps=1e-6, rope_theta=1e4, max_positions=64)
ARCHS = {
    "qwen2": Architecture(family="qwen2", tied=False, qkv_bias=True, qk_norm=False, **SHAPE),
    "qwen2-tied": Architecture(family="qwen2", tied=True, qkv_bias=True, qk_norm=False, **SHAPE),
    "qwen3": Architecture(family="qwen3", tied=False, qkv_bias=False, qk_norm=True, **SHAPE),
    "qwen3-tied": Architecture(family="qwen3", tied=True, qkv_bias=False, qk_norm=True, **SHAPE),
    "llama": Architecture(family="llama", tied=False, qkv_bias=False, qk_norm=False, **SHAPE),
    "llama-tied": Architecture(family="llama", tied=True, qkv_bias=False, qk_norm=False, **SHAPE),
    "qwen3-moe": Architecture(family="qwen3_moe", tied=False, qkv_bias=False, qk_norm=True, experts=8, top_k=2, **SHAPE),
}


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_round_trip_is_bit_exact_and_covers_every_tensor_once(name: str, tp: int, head: str) -> None:
    arch = ARCHS[name]
    tensors = {n: torch.randn(s) for n, s in hf_shapes(arch, head).items()}
    assert ("score.weight" in tensors) == (head == "scalar")
    back: dict[str, torch.Tensor] = {}
    for rule in model_rules(arch, range(arch.n_layers), True, True, head):
        shards = [to_megatron(rule, [tensors[n] for n in rule.hf], arch, tp, r) for r in range(tp)]
        for n, t in to_hf(rule, shards, arch):
            assert n not in back
            back[n] = t
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)


def test_stages_hold_every_parameter_once_except_the_tied_copy() -> None:
    arch = ARCHS["qwen2-tied"]
    stages = [model_rules(arch, range(0, 2), True, False), model_rules(arch, range(2, 3), False, True)]
    names = [r.megatron for s in stages for r in s]
    assert len(names) == len(set(names))
    assert stages[1][-1].hf == ("model.embed_tokens.weight",)


def test_fused_norms_stand_with_the_matrix_behind_them() -> None:
    """Transformer Engine's names of the same tensors, as megatron-core's modules of it have them."""
    arch = ARCHS["qwen3"]
    plain, fused = (model_rules(arch, range(1, 2), False, True, fused_norms=on) for on in (False, True))
    renamed = {a.megatron: b.megatron for a, b in zip(plain, fused, strict=True) if a.megatron != b.megatron}
    assert renamed == {
        "decoder.layers.1.input_layernorm.weight": "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight": "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
    }
    assert [(r.hf, r.layout) for r in plain] == [(r.hf, r.layout) for r in fused]


def test_the_norm_in_front_of_experts_is_fused_with_nothing() -> None:
    names = [r.megatron for r in model_rules(ARCHS["qwen3-moe"], range(1), False, False, fused_norms=True)]
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in names
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names


def test_a_rank_has_whole_experts_gate_above_up() -> None:
    arch = ARCHS["qwen3-moe"]
    rule = next(r for r in model_rules(arch, range(1), False, False) if r.megatron.endswith("mlp.gate_up"))
    assert rule.hf[4:6] == ("model.layers.0.mlp.experts.2.gate_proj.weight", "model.layers.0.mlp.experts.2.up_proj.weight")
    shard = to_megatron(rule, [torch.full((arch.ffn, arch.hidden), float(i)) for i in range(16)], arch, tp=4, rank=1)
    assert shard.shape == (2, 2 * arch.ffn, arch.hidden)
    assert shard[:, :: arch.ffn, 0].tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_a_scalar_head_stands_on_the_last_stage_in_place_of_the_vocabulary() -> None:
    for arch in ARCHS.values():
        first, last = model_rules(arch, range(0, 2), True, False, "scalar"), model_rules(arch, range(2, 3), False, True, "scalar")
        assert last[-1].hf == ("score.weight",) and last[-1].layout == "replicated"
        names = [n for rule in (*first, *last) for n in rule.hf]
        assert len(names) == len(set(names)) and "lm_head.weight" not in names


def test_qkv_shard_of_a_rank_holds_its_own_heads() -> None:
    arch = ARCHS["qwen2"]
    rule = next(r for r in model_rules(arch, range(1), True, False) if r.layout == "qkv")
    q, k, v = (torch.full((n * arch.head_dim, arch.hidden), float(i)) for i, n in enumerate((8, 4, 4)))
    q += torch.arange(8).repeat_interleave(arch.head_dim)[:, None] / 100
    shard = to_megatron(rule, [q, k, v], arch, tp=2, rank=1)
    assert shard[0, 0] == pytest.approx(0.04)  # the first query head of rank 1 is head 4
