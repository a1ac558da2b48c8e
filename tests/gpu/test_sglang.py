"""SGLang on a GPU: memory that is given back while it sleeps, and the same answers afterwards."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlinf import device as devices
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.sglang_engine import SGLangEngine
from rlinf.weights.source import Disk
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SGLangEngine]:
    pytest.importorskip("sglang")
    make_tiny_model(tmp_path / "model", hidden=256, heads=4, kv_heads=2)
    engine = SGLangEngine(
        str(tmp_path / "model"), dtype="bf16", slots=4, max_context=128, seed=0, log=tmp_path / "sglang.log", run_id="gpu-sglang",
        device="cuda", memory_fraction=0.2, native={"enable_memory_saver": "true"},
    )  # fmt: skip
    yield engine
    engine.close()


async def answer(engine: SGLangEngine, name: str) -> list[int]:
    request = GenerateRequest(name, np.arange(1, 20, dtype=np.int32), 1, SamplingParams(temperature=0), Stop(), 16)
    return [s async for s in engine.generate(request)][0].token_ids.tolist()


def test_a_sleeping_server_gives_its_memory_back_and_wakes_the_same(engine: SGLangEngine, tmp_path: Path) -> None:
    async def whole() -> None:
        assert engine.capabilities.sleep
        before, awake = await answer(engine, "before"), devices.free_gpu_memory()
        await engine.sleep(frozenset({"kv", "weights"}))
        assert devices.free_gpu_memory() - awake >= 0.1 * devices.gpu_memory()
        await engine.load_weights(Disk(str(tmp_path / "model")), 1)
        await engine.wake(frozenset({"kv"}))
        assert await answer(engine, "after") == before

    asyncio.run(whole())


def test_a_trace_of_a_server_has_the_kernels_of_the_device(engine: SGLangEngine, tmp_path: Path) -> None:
    async def whole() -> None:
        await engine.start_trace(tmp_path / "profile", "step")
        await answer(engine, "traced")
        await engine.stop_trace()

    asyncio.run(whole())
    (file,) = (tmp_path / "profile").rglob("*.gz")
    assert '"cat": "kernel"' in gzip.decompress(file.read_bytes()).decode()
