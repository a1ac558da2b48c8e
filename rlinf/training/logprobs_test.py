"""Vocab-parallel, chunked log-probabilities and entropy against log_softmax over whole logits in fp64, values and gradients."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROWS, HIDDEN, VOCAB = 37, 16, 131  # 131 rows are padded to 132 over 2 ranks and over 4


def problem(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(0, 1, (ROWS, HIDDEN)).astype(np.float32), "weight": rng.normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32),
        "targets": np.concatenate([[0, VOCAB - 1, 65, 66], rng.integers(0, VOCAB, ROWS - 4)]),  # both sides of the shards' border
        "grad_logprob": rng.normal(0, 1, ROWS).astype(np.float32), "grad_entropy": rng.normal(0, 1, ROWS).astype(np.float32),
    }  # fmt: skip


def plain(p: dict[str, np.ndarray], temperature: float, with_entropy: bool) -> dict[str, np.ndarray]:
    hidden, weight = (torch.from_numpy(p[k]).double().requires_grad_() for k in ("hidden", "weight"))
    logprobs = (hidden @ weight.t() / temperature).log_softmax(-1)
    chosen = logprobs.gather(1, torch.from_numpy(p["targets"])[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(1)
    loss = (chosen * torch.from_numpy(p["grad_logprob"])).sum()
    if with_entropy:
        loss = loss + (entropy * torch.from_numpy(p["grad_entropy"])).sum()
    loss.backward()
    values = {"logprob": chosen, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}
    return {k: v.detach().numpy() for k, v in values.items()}


def parallel(
    at: Any, p: dict[str, np.ndarray], temperature: float, with_entropy: bool, chunk_rows: int, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """In a rank: with this rank's shard of the weight; chunk_rows rows of logits at a time."""
    from megatron.core import parallel_state as mpu

    from rlinf.training import logprobs

    shard = -(-VOCAB // at.tp)
    padded = np.concatenate([p["weight"], np.full((shard * at.tp - VOCAB, HIDDEN), 7.0, np.float32)])  # padding that would show
    kind = getattr(torch, dtype)
    hidden = torch.from_numpy(p["hidden"]).to(kind).requires_grad_()
    weight = torch.from_numpy(padded[at.tp_rank * shard : (at.tp_rank + 1) * shard]).to(kind).requires_grad_()
    default, logprobs.CHUNK_BYTES = logprobs.CHUNK_BYTES, weight.element_size() * shard * chunk_rows
    block, logprobs.CPU_BLOCK_BYTES = logprobs.CPU_BLOCK_BYTES, 4 * shard * 2  # two rows
    logprob, entropy = logprobs.target_logprobs(
        hidden, weight, torch.from_numpy(p["targets"]), temperature=temperature, vocab=VOCAB, group=mpu.get_tensor_model_parallel_group()
    )
    loss = (logprob * torch.from_numpy(p["grad_logprob"])).sum()
    if with_entropy:
        loss = loss + (entropy * torch.from_numpy(p["grad_entropy"])).sum()
    loss.backward()
    logprobs.CHUNK_BYTES, logprobs.CPU_BLOCK_BYTES = default, block
    values = {"logprob": logprob, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}
    return {k: v.detach().float().numpy() for k, v in values.items()}


def assemble(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Each rank's share of the gradient of `hidden` is summed (as the layer before does it), shards of the weight are put together."""
    for rank in ranks:
        assert np.array_equal(rank["logprob"], ranks[0]["logprob"]) and np.array_equal(rank["entropy"], ranks[0]["entropy"])
    weight = np.concatenate([r["weight"] for r in ranks])
    assert (weight[VOCAB:] == 0).all()  # padding rows get no gradient
    return {
        "logprob": ranks[0]["logprob"],
        "entropy": ranks[0]["entropy"],
        "hidden": sum(r["hidden"] for r in ranks),
        "weight": weight[:VOCAB],
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_values_and_gradients_are_those_of_log_softmax(rank_pool: Any, tp: int) -> None:
    for temperature, with_entropy in itertools.product((1.0, 0.6), (False, True)):
        want = plain(problem(), temperature, with_entropy)
        for chunk_rows in (1, 5, ROWS, 1000):
            got = assemble(rank_pool.run(parallel, problem(), temperature, with_entropy, chunk_rows, ranks=tp, tp=tp))
            for name, value in want.items():
                np.testing.assert_allclose(
                    got[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{name}, {temperature}, {with_entropy}, {chunk_rows}"
                )


def test_chunks_change_the_values_by_no_more_than_rounding(rank_pool: Any) -> None:
    runs = [rank_pool.run(parallel, problem(), 0.6, True, rows, ranks=2, tp=2)[0] for rows in (4, 8)]
    for name in ("logprob", "entropy"):
        np.testing.assert_allclose(runs[0][name], runs[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_differs_only_by_its_rounding(rank_pool: Any, dtype: str) -> None:
    (got,) = rank_pool.run(parallel, problem(), 1.0, True, 5, dtype, ranks=1)
    want = plain(problem(), 1.0, True)
    for name, value in want.items():
        assert np.abs(got[name] - value).max() < 0.03 * max(1.0, np.abs(value).max()), name


def extreme(at: Any) -> dict[str, np.ndarray]:
    """Logits of +-1000: no overflow, and a certain token has log-probability 0 and entropy 0."""
    from megatron.core import parallel_state as mpu

    from rlinf.training.logprobs import target_logprobs

    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    logprob, entropy = target_logprobs(
        hidden, weight, torch.tensor([0, 0]), temperature=1.0, vocab=3, group=mpu.get_tensor_model_parallel_group()
    )
    (logprob.sum() + entropy.sum()).backward()
    return {"logprob": logprob.detach().numpy(), "entropy": entropy.detach().numpy(), "grad": weight.grad.numpy()}


def test_extreme_logits_stay_finite(rank_pool: Any) -> None:
    (got,) = rank_pool.run(extreme, ranks=1)
    assert got["logprob"].tolist() == [0.0, -2000.0] and got["entropy"].tolist() == [0.0, 0.0] and np.isfinite(got["grad"]).all()


def no_tokens(at: Any) -> tuple[int, bool]:
    from megatron.core import parallel_state as mpu

    from rlinf.training.logprobs import target_logprobs

    hidden, weight = torch.zeros(0, HIDDEN, requires_grad=True), torch.ones(VOCAB, HIDDEN, requires_grad=True)
    logprob, entropy = target_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.long), temperature=1.0, vocab=VOCAB, group=mpu.get_tensor_model_parallel_group()
    )
    (logprob.sum() + entropy.sum()).backward()
    return len(logprob), bool((weight.grad == 0).all())


def test_an_empty_micro_batch_has_zero_gradient(rank_pool: Any) -> None:
    assert rank_pool.run(no_tokens, ranks=1) == [(0, True)]


def largest_tensors(at: Any, rows: int, vocab: int, chunk_bytes: int) -> tuple[int, int]:
    """Bytes of the largest tensor that forward and backward make, and most bytes of such tensors alive at once."""
    import weakref

    from megatron.core import parallel_state as mpu
    from torch.utils._python_dispatch import TorchDispatchMode

    from rlinf.training import logprobs

    alive: dict[int, int] = {}
    peak = [0, 0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    storage = t.untyped_storage()
                    if storage.data_ptr() not in alive:
                        alive[storage.data_ptr()] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, storage.data_ptr(), None)
                    peak[:] = max(peak[0], storage.nbytes()), max(peak[1], sum(alive.values()))
            return out

    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,))
    default, logprobs.CHUNK_BYTES = logprobs.CHUNK_BYTES, chunk_bytes
    with Watch():
        logprob, entropy = logprobs.target_logprobs(
            hidden, weight, targets, temperature=0.7, vocab=vocab, group=mpu.get_tensor_model_parallel_group()
        )
        (logprob.sum() + entropy.sum()).backward()
    logprobs.CHUNK_BYTES = default
    return peak[0], peak[1]


def test_extra_memory_is_bounded_by_chunks(rank_pool: Any) -> None:
    rows, vocab, chunk = 4096, 1000, 1 << 18  # all logits: 16 MB; a chunk: 0.26 MB
    ((largest, at_once),) = rank_pool.run(largest_tensors, rows, vocab, chunk, ranks=1)
    assert largest <= chunk
    assert largest < at_once <= 5 * chunk + 40 * rows  # logits, their exponentials, the gradient; a few numbers a row


def gradients_of_two_passes(at: Any, p: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    from megatron.core import parallel_state as mpu

    from rlinf.training import logprobs

    default, logprobs.CHUNK_BYTES = logprobs.CHUNK_BYTES, 4 * VOCAB * 8  # five chunks
    leaves = [torch.from_numpy(p[name]).requires_grad_() for name in ("hidden", "weight")]
    logprob, entropy = logprobs.target_logprobs(
        *leaves, torch.from_numpy(p["targets"]), temperature=0.7, vocab=VOCAB, group=mpu.get_tensor_model_parallel_group()
    )
    loss = (logprob * torch.from_numpy(p["grad_logprob"])).sum() + entropy.sum()
    passes = [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    logprobs.CHUNK_BYTES = default
    return [[g.numpy() for g in grads] for grads in passes]


def test_the_gradient_can_be_asked_for_twice(rank_pool: Any) -> None:
    """The first time it takes the place of the last chunk's logits."""
    ((first, second),) = rank_pool.run(gradients_of_two_passes, problem(), ranks=1)
    for one, other in zip(first, second):
        assert np.array_equal(one, other)


def test_the_default_chunk_is_small_beside_the_logits_of_a_long_context() -> None:
    from rlinf.training.logprobs import CHUNK_BYTES

    assert CHUNK_BYTES <= 1 << 28 < 28_672 * 151_936 * 4 / 60


def model_logits_gap(at: Any, folder: Path) -> tuple[float, float]:
    """The whole model against plain transformers: on the tokens of some responses; and on every token of the vocabulary behind
    one prompt, which is all that softmax sees of the logits there."""
    from transformers import AutoModelForCausalLM

    from rlinf.data.packing import SampleRef
    from rlinf.data.records import Finish, Group, Prompt, Sample
    from rlinf.training.packed_batch import pack
    from tests.training_ranks import build, logprobs, minibatches

    engine = build(at, folder)
    packs, *_ = minibatches(engine, n=1, share_prefix=False, budget=1000)[0]
    got = torch.cat(logprobs(engine, packs))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    (batch,) = packs
    want, row = [], 0
    for number, group in enumerate(batch.packed_groups):
        tokens = batch.token_ids[row : row + group.prompt + group.own]
        targets = batch.targets[batch.sample_N == number]
        logits = model(tokens[None]).logits[0, group.prompt - 1 :]
        want.append((logits / batch.temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0].detach())
        row += len(tokens)
    of_responses = (got - torch.cat(want)).abs().max().item()
    prompt = np.arange(3, 60, 5, dtype=np.int32)
    one = lambda v: Sample(f"p/{v}", np.array([v], np.int32), np.zeros(1, np.float32), np.ones(1, np.uint8), ((0, 1),), Finish.STOP)
    group = Group("p", Prompt("p", prompt, "math", ("",)), tuple(one(v) for v in range(engine.arch.vocab)))
    refs = [SampleRef(0, v, 0.0) for v in range(engine.arch.vocab)]
    whole = pack([group], refs, share_prefix=True, temperature=1.0, pad_to=1, device=torch.device("cpu"))
    expected = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1].log_softmax(-1)
    return of_responses, (logprobs(engine, [whole])[0] - expected).abs().max().item()


@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "llama", "llama-tied"])
def test_logprobs_are_those_of_transformers(rank_pool: Any, tiny_models: dict[str, Path], family: str) -> None:
    (gaps,) = rank_pool.run(model_logits_gap, tiny_models[family], ranks=1)
    assert max(gaps) < 1e-5
