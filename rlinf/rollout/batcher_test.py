"""Scheduling does not change results: chunked prefill, refilled slots, shrinking batches, retraction, a small prefix store."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.config.model import load_model_config
from rlinf.rollout import batcher as batcher_module
from rlinf.rollout.batcher import Batcher
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.embedded_model import EmbeddedModel
from rlinf.rollout.running_sample import Job
from rlinf.rollout.slot_cache import CachedPrompt, PrefixCache
from rlinf.weights.architecture import read_architecture
from rlinf.weights.tensor_folder import open_hf_folder
from tests.tiny import make_tiny_model

CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedModel:
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", layers=2)
    made = EmbeddedModel(read_architecture(load_model_config(str(folder))), torch.float32, torch.device("cpu"), CONTEXT)
    made.load(open_hf_folder(folder).items())
    return made


def workload(seed: int = 0) -> list[GenerateRequest]:
    """Prompts of 1 to 200 tokens, some with a common head, several samples each, of very different lengths."""
    rng = np.random.default_rng(seed)
    head = rng.integers(0, 256, 60)
    requests = []
    for i, length in enumerate((1, 2, 9, 60, 75, 75, 120, 200, 33, 75)):
        ids = rng.integers(0, 256, length)
        ids[: min(length, 60) if i % 2 else 0] = head[: min(length, 60) if i % 2 else 0]
        new = int(rng.integers(1, 40))
        requests.append(GenerateRequest(f"r{i}", ids.astype(np.int32), 1 + i % 4, SamplingParams(), Stop(), new))
    return requests


def finish(batcher: Batcher, steps: int = 10_000) -> dict[str, list[int]]:
    out = {}
    while batcher.busy and steps:
        steps -= 1
        out |= {sample.sample_id: sample.token_ids.tolist() for _, sample in batcher.step()}
    return out


def run(model: EmbeddedModel, slots: int) -> dict[str, list[int]]:
    batcher = Batcher(model, slots, CONTEXT, 0, None)
    for request in workload():
        batcher.submit(Job(request, request.n))
    return finish(batcher)


def test_chunks_slots_and_a_tiny_store_change_nothing(model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(model, 16)
    assert len(expected) == sum(r.n for r in workload()) and all(expected.values())
    monkeypatch.setattr(batcher_module, "PREFILL_CHUNK", 7)
    monkeypatch.setattr(batcher_module, "PREFILL_TOKENS", 20)
    monkeypatch.setattr(batcher_module, "PREFIX_TOKENS_PER_SLOT", 1)
    assert run(model, 5) == expected


@pytest.mark.parametrize("after", [1, 3, 6, 15])
def test_retraction_at_any_moment_changes_nothing(model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr(batcher_module, "PREFILL_CHUNK", 30)
    batcher = Batcher(model, 6, CONTEXT, 0, None)
    for request in workload():
        batcher.submit(Job(request, request.n))
    out = finish(batcher, after)
    batcher.retract()
    assert out | finish(batcher) == run(model, 6)


def test_slots_shrink_with_their_samples_and_regrow(model: EmbeddedModel) -> None:
    batcher = Batcher(model, 2, CONTEXT, 0, None)
    for name, length in (("long", 200), ("short", 10)):
        request = GenerateRequest(name, np.arange(length, dtype=np.int32), 1, SamplingParams(), Stop(), 3)
        batcher.submit(Job(request, 1))
        finish(batcher)
        assert batcher._slots.capacity == {"long": 224, "short": 32}[name]


def test_bf16_scores_stay_near_fp32(model: EmbeddedModel, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", "qwen3", layers=2)
    small = EmbeddedModel(model.arch, torch.bfloat16, torch.device("cpu"), CONTEXT)
    small.load(open_hf_folder(folder).items())
    ids = [np.arange(n, dtype=np.int32) for n in (2, 40, 200)]
    exact, rounded = (Batcher(m, 1, CONTEXT, 0, None).sequence_logprobs(ids) for m in (model, small))
    assert [len(s) for s in exact] == [1, 39, 199]
    assert max(np.abs(a - b).max() for a, b in zip(exact, rounded)) < 0.1


def test_prefix_store_keeps_the_recent_within_its_budget() -> None:
    store = PrefixCache(max_tokens=100)
    contexts = [np.full(40, i, np.int32) for i in range(3)]
    for ids in contexts[:2]:
        store.add(CachedPrompt(ids, torch.empty(0), torch.empty(0)))
    assert store.whole(contexts[0]) is not None  # now the most recent
    store.add(CachedPrompt(contexts[2], torch.empty(0), torch.empty(0)))
    assert store.whole(contexts[1]) is None and store.whole(contexts[0]) is not None
    shared, entry = store.longest(np.concatenate([contexts[2][:30], contexts[0]]))
    assert shared == 30 and entry.token_ids is contexts[2]
    assert store.longest(contexts[2])[0] == 39  # the last token is always computed: its logits are needed
    store.add(CachedPrompt(np.zeros(500, np.int32), torch.empty(0), torch.empty(0)))
    assert store.whole(np.zeros(500, np.int32)) is not None and store.whole(contexts[2]) is None


def test_generation_draws_from_no_global_generator_so_nothing_of_it_needs_to_be_saved(model: EmbeddedModel) -> None:
    def states() -> list[bytes]:
        return [torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()).encode(), repr(random.getstate()).encode()]

    before = states()
    first = run(model, 4)
    assert states() == before
    torch.rand(3), np.random.random(), random.random()
    assert states() != before and run(model, 4) == first
