"""Operations by hand, and as torch counts them in a real forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rlinf.config.schema import ActorModelConfig, LoraConfig
from rlinf.scheduling.devices import data_sheet_flops
from rlinf.scheduling.flops import Work, adapter_flops, forward_flops, generation_work, recomputed_flops, recomputed_layers, update_flops
from rlinf.weights.architecture import Architecture
from tests.tiny import make_tiny_model

ARCH = Architecture("qwen3", 2, 8, 4, 2, 3, 10, 100, 1e-6, 1e4, 64, False, False, True)


def test_the_formula_by_hand() -> None:
    weights = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 3 * 8 * 10  # q, k and v, output, MLP
    assert forward_flops(ARCH, Work(rows=5)) == 2 * 2 * weights * 5
    assert forward_flops(ARCH, Work(heads=7)) == 2 * 8 * 100 * 7
    assert forward_flops(ARCH, Work(pairs=9)) == 2 * 2 * 2 * 12 * 9  # layers, two products, multiply and add
    assert forward_flops(ARCH, Work(5, 7, 9)) == sum(forward_flops(ARCH, w) for w in (Work(rows=5), Work(heads=7), Work(pairs=9)))


def test_it_is_what_torch_counts(tmp_path: Path) -> None:
    """torch counts the whole square of scores; we count the causal half."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, "qwen3", hidden=32, layers=3), attn_implementation="eager")
    c, n = model.config, 10
    arch = replace(ARCH, n_layers=3, hidden=32, n_heads=4, n_kv_heads=2, head_dim=c.head_dim, ffn=c.intermediate_size, vocab=c.vocab_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(n)[None])
    rotary = 2 * (c.head_dim // 2) * n  # the angles, an outer product
    assert counter.get_total_flops() - rotary == forward_flops(arch, Work(n, n, n * n))


def test_generation_feeds_every_token_but_the_last() -> None:
    assert generation_work(3, [1]) == Work(3, 1, 6)  # the prompt's last row gives the only token
    assert generation_work(3, [4, 1]) == Work(6, 5, 6 + (4 + 5 + 6))
    assert generation_work(3, [4]) + generation_work(3, [2]) == Work(3 + 3 + 3 + 1, 6, 6 + 15 + 6 + 4)


def test_recompute_is_added() -> None:
    model = ActorModelConfig()
    work = Work(5, 7, 9)
    assert recomputed_flops(ARCH, model, work) == 0
    model.recompute_granularity = "selective"
    assert recomputed_flops(ARCH, model, work) == forward_flops(ARCH, Work(pairs=9))
    model.recompute_granularity, model.recompute_method, model.recompute_num_layers = "full", "block", 1
    assert recomputed_layers(model, 2) == 0.5 and recomputed_flops(ARCH, model, work) == forward_flops(ARCH, Work(5, 0, 9)) / 2
    model.recompute_method = "uniform"
    assert recomputed_flops(ARCH, model, work) == forward_flops(ARCH, Work(5, 0, 9))


def test_with_adapters_only_theirs_and_the_inputs_gradients_are_computed(tmp_path: Path) -> None:
    """Against torch's count of a model whose matrices have low-rank matrices beside them."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, "qwen3", hidden=32, layers=3), attn_implementation="eager")
    c, n, lora = model.config, 10, LoraConfig(rank=3, target_modules=["linear_qkv", "linear_fc2"])
    arch = replace(ARCH, n_layers=3, hidden=32, n_heads=4, n_kv_heads=2, head_dim=c.head_dim, ffn=c.intermediate_size, vocab=c.vocab_size)
    model.requires_grad_(False)
    for name, matrix in list(model.named_modules()):
        if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "down_proj"):
            matrix.a, matrix.b = torch.nn.Linear(matrix.in_features, 3, bias=False), torch.nn.Linear(3, matrix.out_features, bias=False)
            matrix.register_forward_hook(lambda m, inputs, output: output + m.b(m.a(inputs[0])))
    embedded = model.model.embed_tokens(torch.arange(n)[None]).requires_grad_()  # the first layer goes on to its input here
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    rotary = 2 * (c.head_dim // 2) * n
    work = Work(n, n, n * n)
    assert counter.get_total_flops() - rotary == update_flops(arch, work, lora)
    assert adapter_flops(arch, lora, work) == 2 * 3 * 3 * n * (32 + 4 * c.head_dim + 2 * (32 + 2 * c.head_dim) + c.intermediate_size + 32)
    assert update_flops(arch, work, LoraConfig()) == 3 * forward_flops(arch, work)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA T4", 0),
    ],
)
def test_the_data_sheet_is_found_by_the_drivers_name(name: str, tera: float) -> None:
    assert data_sheet_flops(name) == tera * 1e12
