"""Counted bytes against what real ranks allocate, in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlinf.config.schema import ActorModelConfig, Config, LoraConfig
from rlinf.data.packing import SampleRef
from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.rollout.limits import kv_tokens_on_cpu
from rlinf.scheduling.memory import (
    LOGITS_BLOCK,
    LOGITS_CHUNK,
    adapter_outputs,
    engine_memory,
    head_memory,
    layer_activations,
    rank_memory,
    rank_parameters,
    stage_activations,
)
from rlinf.training import logprobs
from rlinf.training.packed_batch import pack
from rlinf.weights.architecture import Architecture, open_architecture
from rlinf.weights.mapping import hf_shapes
from tests.training_ranks import build

LAYOUTS = [
    (1, 1, 1, 1),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (2, 1, 1, 1),
    (4, 2, 2, 1),
    (4, 1, 4, 1),
    (4, 2, 1, 1),
    (4, 1, 2, 1),
    (4, 1, 1, 2),
]  # ranks, TP, PP, CP
FAMILIES = ("qwen2", "qwen2-tied", "qwen3", "llama", "qwen3-moe")


def shape(folder: Path) -> Architecture:
    return open_architecture(folder)


def allocated(at: Any, folder: Path, precision: str, lora: LoraConfig) -> dict[str, int]:
    """Parameters, and bytes of each kind, that a rank really has."""
    engine = build(at, folder, precision=precision, lora=lora)
    engine.optimizer_state.allocate()
    optimizer = engine.distributed.optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in masters for t in (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
    if precision != "fp32":  # in fp32 the master weights are views of the model's
        states += masters
    return {
        "stage": at.pp_rank, "dp": at.dp, "parameters": sum(p.numel() for p in engine.model.parameters()),
        "weights": sum(p.nbytes for p in engine.model.parameters()),
        "gradients": sum(p.main_grad.nbytes for p in engine.model.parameters() if p.requires_grad),
        "optimizer": sum(t.nbytes for t in states), "padded": sum(b.grad_data.nbytes for b in engine.ddp.buffers),
    }  # fmt: skip


@pytest.mark.parametrize(("family", "precision", "lora"), [
    ("qwen2", "bf16", LoraConfig()),
    ("qwen3", "bf16", LoraConfig(rank=3, target_modules=["linear_qkv", "linear_proj", "linear_fc2"])),
    *(pytest.param(f, p, lora, marks=pytest.mark.slow) for f in FAMILIES for p in ("fp32", "bf16")
      for lora in (LoraConfig(), LoraConfig(rank=5)) if (f, p, lora.rank) != ("qwen2", "bf16", 0)),
])  # fmt: skip
def test_weights_gradients_and_optimizer_are_those_of_real_ranks(
    rank_pool: Any, tiny_models: dict[str, Path], family: str, precision: str, lora: LoraConfig
) -> None:
    folder = tiny_models[family]
    arch, config = shape(folder), Config()
    config.actor.model.precision, config.actor.lora = precision, lora
    model = config.actor.model
    for ranks, tp, pp, cp in LAYOUTS:
        model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size = tp, pp, cp
        found = rank_pool.run(allocated, folder, precision, lora, ranks=ranks, tp=tp, pp=pp, cp=cp)
        for real in found:
            counted = rank_memory(arch, config, "actor", real["dp"], real["stage"], gpu=False)
            assert (counted.parameters, counted.weights, counted.gradients) == (real["parameters"], real["weights"], real["gradients"]), (
                tp,
                pp,
            )
            assert (
                0 <= real["padded"] - counted.gradients <= 4 * 256 * (arch.n_layers * 8 + 4)
            )  # parameters start at multiples of 64, buffers end at 128
        for stage in range(pp):  # a rank's share depends on where the buffer is cut; together they hold everything once
            total = sum(real["optimizer"] for real in found if real["stage"] == stage)
            wanted = (
                sum(rank_memory(arch, config, "actor", 1, stage, gpu=False).optimizer for real in found if real["stage"] == stage)
                // found[0]["dp"]
            )
            assert total == wanted, (tp, pp, stage)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_has_all_parameters_of_the_model(tiny_models: dict[str, Path], family: str) -> None:
    arch = shape(tiny_models[family])
    for head in ("lm", "scalar"):
        assert rank_parameters(arch, 1, 1, 0, head) == sum(torch.Size(s).numel() for s in hf_shapes(arch, head).values())


def saved_bytes(at: Any, folder: Path, tokens: int, lora: LoraConfig) -> int:
    """Bytes that autograd keeps of one sequence's layers and the rows that go into the head, besides parameters.

    Torch's RMSNorm on CPU keeps two fp32 copies where CUDA's fused one and ours keep the 16-bit input: those are counted as the latter.
    """
    engine = build(at, folder, precision="bf16", lora=lora)
    ids, n = np.arange(tokens + 1, dtype=np.int32) % 100, tokens
    sample = Sample("p/0", ids[1:], np.full(n, np.nan, np.float32), np.ones(n, np.uint8), ((0, n),), Finish.STOP)
    group = Group("p", Prompt("p", ids[:1], "math", ("",)), (sample,))
    packed = pack([group], [SampleRef(0, 0, 0.0)], share_prefix=False, temperature=1.0, pad_to=1, device=engine.device)
    own = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        rows = tensor.ndim > 2 or tensor.numel() > tokens * engine.arch.head_dim  # not the angles of the rotary embedding
        if storage.data_ptr() not in own and rows:
            norm = tensor.dtype == torch.float32 and tensor.shape == (tokens, 1, engine.arch.hidden)
            kept[storage.data_ptr()] = (storage.nbytes() // (4 if norm else 1), tensor)  # the tensor: its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.model.forward_packed(packed)
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize(("family", "rank"), [("qwen2", 0), ("qwen2-tied", 0), ("qwen2", 12), ("qwen3-moe", 0)])
def test_activations_are_what_autograd_keeps(rank_pool: Any, tiny_models: dict[str, Path], family: str, rank: int) -> None:
    tokens, lora = 1100, LoraConfig(rank=rank)  # long enough for flash attention
    (kept,) = rank_pool.run(saved_bytes, tiny_models[family], tokens, lora, ranks=1)
    low = adapter_outputs(shape(tiny_models[family]), lora)
    counted, _ = stage_activations(shape(tiny_models[family]), ActorModelConfig(precision="bf16"), tokens, 1, gpu=False, low=low)
    assert 0.8 < kept / counted < 1.05, (kept, counted)  # one sequence: attention's outputs are not joined, which is counted


def test_recompute_and_sharding_lower_activations_in_the_expected_order(tiny_models: dict[str, Path]) -> None:
    arch = replace(shape(tiny_models["llama"]), n_layers=8)
    plain = ActorModelConfig()
    some = replace(plain, recompute_granularity="full", recompute_method="block", recompute_num_layers=4)
    every = replace(some, recompute_num_layers=8)
    chunks = replace(some, recompute_method="uniform", recompute_num_layers=1)
    selective = replace(plain, recompute_granularity="selective")
    sizes = [stage_activations(arch, m, 1000, 1, gpu=True)[0] for m in (plain, selective, some, every)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert stage_activations(arch, chunks, 1000, 1, gpu=True) == stage_activations(arch, every, 1000, 1, gpu=True)
    assert stage_activations(arch, some, 1000, 1, gpu=True)[1] < stage_activations(arch, every, 1000, 1, gpu=True)[1]
    assert stage_activations(arch, plain, 1000, 2, gpu=True)[0] == 2 * sizes[0]
    split = replace(plain, tensor_model_parallel_size=2)
    assert layer_activations(arch, replace(split, sequence_parallel=True), 1000, True) == layer_activations(arch, plain, 1000, True) // 2
    assert layer_activations(arch, split, 1000, True) > layer_activations(arch, plain, 1000, True) // 2


def test_context_parallelism_divides_what_is_kept_of_a_micro_batch_but_for_gathered_keys(tiny_models: dict[str, Path]) -> None:
    arch, config = shape(tiny_models["llama"]), Config()
    config.runner.max_tokens_per_mbs = 4096
    whole = rank_memory(arch, config, "actor", 4, 0, gpu=True)
    config.actor.model.context_parallel_size = 4
    part = rank_memory(arch, config, "actor", 1, 0, gpu=True)
    keys = arch.n_layers * 3 * 1024 * 2 * arch.n_kv_heads * arch.head_dim * 2  # of three other ranks: keys and values in 16 bits
    assert part.activations == whole.activations // 4 + keys
    assert (part.weights, part.gradients, part.optimizer) == (whole.weights, whole.gradients, whole.optimizer)
    assert part.workspace < whole.workspace


def test_the_chunks_are_those_of_the_head() -> None:
    assert {"cpu": logprobs.CHUNK_BYTES, "gpu": logprobs.GPU_CHUNK_BYTES} == LOGITS_CHUNK and logprobs.BLOCK_BYTES == LOGITS_BLOCK


def test_the_head_never_holds_all_logits(tiny_models: dict[str, Path]) -> None:
    arch = replace(shape(tiny_models["llama"]), vocab=151936, hidden=1536)
    model = ActorModelConfig()
    small, large = (head_memory(arch, model, tokens, gpu=True) for tokens in (4000, 30000))
    assert large - small == 3 * 26000 * 1536 * 2
    assert large < 30000 * 151936 * 4 / 6


def test_an_engine_replicates_key_value_heads_that_do_not_split(tiny_models: dict[str, Path]) -> None:
    arch, config = shape(tiny_models["qwen2"]), Config()
    sizes = {}
    for tp in (1, 2, 4):
        config.rollout.tensor_parallel_size = tp
        sizes[tp] = engine_memory(arch, config, gpu=True)
    assert [sizes[tp].kv_token for tp in (1, 2, 4)] == [2 * 4 * heads * 8 * 2 for heads in (2, 1, 1)]
    assert sizes[1].weights == 2 * sum(torch.Size(s).numel() for s in hf_shapes(arch).values())


@pytest.mark.parametrize(
    ("backend", "gpu", "changes", "tokens"),
    [
        ("embedded", False, {}, 64 * 2048),
        ("sglang", True, {}, 2048),
        ("sglang", False, {"max_running_requests": 4}, 4 * (2048 + 8)),
        ("sglang", False, {}, 65_536),
        ("sglang", False, {"sglang": {"max_total_tokens": "9000"}}, 9000),
    ],
)
def test_the_kv_cache_of_an_engine(tiny_models: dict[str, Path], backend: str, gpu: bool, changes: dict, tokens: int) -> None:
    config = Config()
    config.runner.seq_length, config.rollout = 2048, replace(config.rollout, rollout_backend=backend, **changes)
    assert engine_memory(shape(tiny_models["qwen2"]), config, gpu).tokens == tokens


def test_a_server_on_cpu_holds_one_whole_sample_at_least() -> None:
    assert kv_tokens_on_cpu(64, 100_000) == 100_008 and kv_tokens_on_cpu(4, 1000) == 4032
