"""Attention over a packed micro-batch equals attention over each sample alone, values and gradients, on both code paths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlinf.config.schema import ActorModelConfig
from rlinf.data.packing import SampleRef
from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.training import attention
from rlinf.training.attention import PackedAttention, rope_tables
from rlinf.training.context import share_of
from rlinf.training.model import transformer_config
from rlinf.training.packed_batch import COMMON_MIN, PackedBatch, pack
from rlinf.weights.architecture import Architecture

HEADS, GROUPS, DIM = 6, 2, 8
ARCH = Architecture("llama", 2, 48, HEADS, GROUPS, DIM, 64, 1000, 1e-6, 10000.0, 512, False, False, False)
# prompt length, response lengths: a response of one token has no row of its own
BATCHES = {
    "one sample": [(5, [4])],
    "lengths 1": [(1, [1]), (1, [1, 1]), (4, [1, 1, 1])],
    "equal lengths": [(3, [4, 4, 4]), (6, [2, 2])],
    "mixed lengths": [(7, [1, 9, 3, 1, 5]), (2, [8]), (1, [2, 1, 6])],
    "common start": [(COMMON_MIN + 1, [3, 1, 5]), (COMMON_MIN + 4, [2]), (COMMON_MIN + 2, [4, 4])],
}


def make(shapes: list[tuple[int, list[int]]], share_prefix: bool, pad_to: int, common: int = 0) -> tuple[PackedBatch, list[list[int]]]:
    """A packed batch in which every token is unique (but those of a common start), and the token sequence of each sample."""
    token = iter(range(100, 10_000))
    groups, sequences = [], []
    for g, (length, lengths) in enumerate(shapes):
        prompt = list(range(common)) + [next(token) for _ in range(length - common)]
        responses = [[next(token) for _ in range(n)] for n in lengths]
        samples = tuple(
            Sample(f"{g}/{i}", np.array(r, np.int32), np.zeros(len(r), np.float32), np.ones(len(r), np.uint8), ((0, len(r)),), Finish.STOP)
            for i, r in enumerate(responses)
        )
        groups.append(Group(str(g), Prompt(str(g), np.array(prompt, np.int32), "math", ("",)), samples))
        sequences += [prompt + r[:-1] for r in responses]
    refs = [SampleRef(g, i, 0.0) for g, group in enumerate(groups) for i in range(len(group.samples))]
    return pack(groups, refs, share_prefix=share_prefix, temperature=1.0, pad_to=pad_to, device=torch.device("cpu")), sequences


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence with rotary embedding, written out in fp64: q [L,H,D], k and v [L,K,D] -> [L, H*D]."""
    length = len(q)
    angles = torch.arange(length).double()[:, None] / ARCH.rope_theta ** (torch.arange(0, DIM, 2).double() / DIM)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    turn = lambda x: x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin
    q, k, v = turn(q), turn(k).repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(DIM)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1)


@pytest.mark.parametrize("path", ["explicit", "in blocks", "sdpa"])
@pytest.mark.parametrize("pad_to", [1, 4])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_packed_attention_equals_each_sample_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, share_prefix: bool, pad_to: int, path: str
) -> None:
    monkeypatch.setattr(attention, "CPU_SCORES", 0 if path == "sdpa" else 1 << 40)
    monkeypatch.setattr(attention, "CPU_BLOCK", 1 if path == "in blocks" else 1 << 40)
    batch, sequences = make(BATCHES[name], share_prefix, pad_to, COMMON_MIN if name == "common start" else 0)
    rows = len(batch.token_ids)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, DIM, generator=generator, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS))
    weight = torch.randn(rows, HEADS * DIM, generator=generator)
    module = PackedAttention(transformer_config(ARCH, ActorModelConfig(precision="fp32"), 1, 1), layer_number=1)
    batch.share, batch.rope = share_of(batch, 0, 1), rope_tables(batch.positions, DIM, ARCH.rope_theta, torch.float32)
    out = module(q, k, v, packed_seq_params=batch)
    (out * weight).sum().backward()

    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected, loss = {}, 0.0
    for number, sequence in enumerate(sequences):
        here = rows_of(batch, sequence, number if not share_prefix else None)
        for row, value in zip(here, alone(*(t[here] for t in exact))):
            if row not in expected:  # a shared row is computed once, and its own output counts once
                loss = loss + (value * weight[row].double()).sum()
                expected[row] = value
            else:
                torch.testing.assert_close(value, expected[row])
    loss.backward()
    used = sorted(expected)
    torch.testing.assert_close(out[used].double(), torch.stack([expected[r] for r in used]), rtol=1e-5, atol=2e-6)
    inert = [r for r in range(rows) if r not in expected]
    assert len(inert) == -len(used) % pad_to
    for mine, theirs in zip((q, k, v), exact):
        torch.testing.assert_close(mine.grad[used].double(), theirs.grad[used], rtol=1e-5, atol=5e-6)


def rows_of(batch: PackedBatch, sequence: list[int], number: int | None) -> list[int]:
    """Rows of a sample's tokens. Unshared prompts repeat tokens: there sample `number` is the number-th group."""
    tokens = batch.token_ids.tolist()
    if number is None:
        return [tokens.index(t) for t in sequence]
    first = sum(s.prompt + s.own for s in batch.packed_groups[:number])
    assert tokens[first : first + len(sequence)] == sequence
    return list(range(first, first + len(sequence)))


def test_a_response_does_not_see_its_siblings() -> None:
    """Changing one response changes no row of another."""
    batch, sequences = make(BATCHES["mixed lengths"], True, 1)
    rows = len(batch.token_ids)
    q, k, v = (torch.randn(rows, heads, DIM) for heads in (HEADS, GROUPS, GROUPS))
    module = PackedAttention(transformer_config(ARCH, ActorModelConfig(precision="fp32"), 1, 1), layer_number=1)
    batch.share, batch.rope = share_of(batch, 0, 1), rope_tables(batch.positions, DIM, ARCH.rope_theta, torch.float32)
    before = module(q, k, v, packed_seq_params=batch)
    own = rows_of(batch, sequences[1], None)[7:]  # the response of nine tokens, behind its prompt of seven
    k[own], v[own] = 9.0, 9.0
    after = module(q, k, v, packed_seq_params=batch)
    others = [r for r in range(rows) if r not in own]
    assert torch.equal(before[others], after[others]) and not torch.allclose(before[own], after[own])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_paths_agree_in_half_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    batch, _ = make(BATCHES["mixed lengths"], True, 1)
    q, k, v = (torch.randn(len(batch.token_ids), heads, DIM, dtype=dtype) for heads in (HEADS, GROUPS, GROUPS))
    module = PackedAttention(transformer_config(ARCH, ActorModelConfig(precision="bf16"), 1, 1), layer_number=1)
    batch.share, batch.rope = share_of(batch, 0, 1), rope_tables(batch.positions, DIM, ARCH.rope_theta, dtype)
    outputs = []
    for limit in (1 << 40, 0):
        monkeypatch.setattr(attention, "CPU_SCORES", limit)
        outputs.append(module(q, k, v, packed_seq_params=batch))
    assert outputs[0].dtype == dtype
    torch.testing.assert_close(outputs[0].float(), outputs[1].float(), rtol=0.02, atol=0.02)


def test_dropout_is_refused() -> None:
    config = transformer_config(ARCH, ActorModelConfig(precision="fp32"), 1, 1)
    config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="no dropout"):
        PackedAttention(config, layer_number=1)


@pytest.mark.parametrize(("length", "size"), [(3, 7), (1, 2), (5, 6)])
def test_the_mask_of_a_gpu_is_aligned_to_the_end_of_the_keys_and_is_no_matrix(length: int, size: int) -> None:
    mask = attention._to_the_end(length, size)
    assert mask.untyped_storage().nbytes() == 0
    q, k, v = torch.randn(2, HEADS, length, DIM), torch.randn(2, HEADS, size, DIM), torch.randn(2, HEADS, size, DIM)
    written_out = torch.ones(length, size, dtype=torch.bool).tril(size - length)
    found, expected = (torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.3) for m in (mask, written_out))
    assert torch.allclose(found, expected, atol=1e-6)
