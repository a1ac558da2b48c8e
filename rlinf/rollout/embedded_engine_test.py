"""What the embedded engine promises beyond the contract of all engines."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf.data.records import Sample
from rlinf.rollout import embedded_engine
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.embedded_engine import EmbeddedEngine
from tests.tiny import make_tiny_model


def generate(model: Path, *requests: GenerateRequest) -> dict[str, Sample]:
    engine = EmbeddedEngine(str(model), dtype="fp32", slots=8, max_context=96, seed=1)

    async def samples(request: GenerateRequest) -> list[Sample]:
        return [s async for s in engine.generate(request)]

    async def together() -> list[list[Sample]]:
        return await asyncio.gather(*map(samples, requests))

    try:
        return {s.sample_id: s for group in asyncio.run(together()) for s in group}
    finally:
        engine.close()


def test_a_sample_has_the_same_bits_alone_and_in_any_company(tmp_path: Path) -> None:
    """In fp32: so that a logical schedule, or a restarted engine, repeats what it would have done.

    576 wide, where few rows round differently.
    """
    model = make_tiny_model(tmp_path / "model", hidden=576, layers=2, heads=9, kv_heads=3)
    prompts = [np.random.default_rng(i).integers(1, 256, 9 + 5 * i).astype(np.int32) for i in range(5)]
    requests = [GenerateRequest(f"r{i}", ids, 1 + i % 3, SamplingParams(), Stop(), 12) for i, ids in enumerate(prompts)]
    company = generate(model, *requests)
    for others in (requests[::-1], requests[:1], requests[1:2], [requests[3], requests[0]]):
        for name, sample in generate(model, *others).items():
            assert sample.token_ids.tolist() == company[name].token_ids.tolist()
            assert sample.rollout_logprobs.tobytes() == company[name].rollout_logprobs.tobytes()


def test_an_engine_that_sleeps_hands_its_memory_to_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocator keeps what is freed until it is told: when nothing of the tags is held any more, on the engine's thread."""
    engine = EmbeddedEngine(str(make_tiny_model(tmp_path / "model")), dtype="fp32", slots=4, max_context=64, seed=1)
    told: list[tuple[torch.device, int, bool, bool]] = []

    def give_back(device: torch.device) -> None:
        batcher = engine._batcher
        told.append((device, batcher._slots.capacity, bool(batcher.model._layers), threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(embedded_engine, "give_back_free_memory", give_back)
    try:
        asyncio.run(engine.sequence_logprobs([np.arange(1, 9, dtype=np.int32)]))
        asyncio.run(engine.sleep(frozenset({"kv"})))
        asyncio.run(engine.sleep(frozenset({"kv", "weights"})))
    finally:
        engine.close()
    assert told == [(torch.device("cpu"), 0, True, False), (torch.device("cpu"), 0, False, False)]
