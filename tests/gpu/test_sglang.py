"""SGLang on a GPU: memory that is given back while it sleeps, and the same answers afterwards."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rlinf import device as devices
from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.rollout.sglang_engine import SGLangEngine
from rlinf.rollout.sglang_options import ServerSettings
from rlinf.weights.broadcast import open_store
from rlinf.weights.device_ipc import DeviceBuckets
from rlinf.weights.routes import BROADCAST, Feed, broadcast_groups
from rlinf.weights.server_groups import ServerWire
from rlinf.weights.source import Broadcast, Collective, Disk
from rlinf.weights.tensor_folder import open_hf_folder
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SGLangEngine]:
    pytest.importorskip("sglang")
    make_tiny_model(tmp_path / "model", hidden=256, heads=4, kv_heads=2)
    settings = ServerSettings(
        str(tmp_path / "model"), dtype="bf16", slots=4, max_context=128, seed=0, device="cuda", memory_fraction=0.2,
        native={"enable_memory_saver": "true"},
    )  # fmt: skip
    engine = SGLangEngine(settings, log=tmp_path / "sglang.log", run_id="gpu-sglang")
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


def test_weights_are_taken_from_the_gpu_and_nothing_of_theirs_is_kept(engine: SGLangEngine, tmp_path: Path) -> None:
    async def whole() -> None:
        before = await answer(engine, "before")
        publisher = DeviceBuckets("gpu-sglang-test", devices.choose("cuda"))
        tensors = list(open_hf_folder(tmp_path / "model").items())
        for version, other in ((1, tensors), (2, [(name, t.flip(0)) for name, t in tensors])):
            await engine.load_weights(publisher.publish(other, version, bucket_bytes=1 << 20), version)
            for buffer in publisher._offered.values():
                buffer.zero_()
            publisher.withdraw()
            assert (await answer(engine, f"after {version}") == before) == (version == 1)

    asyncio.run(whole())


def test_a_trace_of_a_server_has_the_kernels_of_the_device(engine: SGLangEngine, tmp_path: Path) -> None:
    async def whole() -> None:
        await engine.start_trace(tmp_path / "profile", "step")
        await answer(engine, "traced")
        await engine.stop_trace()

    asyncio.run(whole())
    (file,) = (tmp_path / "profile").rglob("*.gz")
    assert '"cat": "kernel"' in gzip.decompress(file.read_bytes()).decode()


def test_a_server_joins_the_group_of_a_publisher_on_another_gpu(engine: SGLangEngine, tmp_path: Path) -> None:
    """Over NCCL, first twice with the weights that the server has read from its files, then with others."""
    if devices.gpu_count() < 2:
        pytest.skip("needs two GPUs: NCCL takes one member of a group on each")
    (group,), store = broadcast_groups([Feed(0, BROADCAST)], 1, 1, 1), open_store("127.0.0.1", 0, keeps=True)
    other = make_tiny_model(tmp_path / "other", hidden=256, heads=4, kv_heads=2, seed=1)

    def publish() -> list[Broadcast]:
        device = torch.device("cuda", 1)
        wire = ServerWire(group, open_store("127.0.0.1", store.port, keeps=False), device, 120.0)
        rounds = ((0, tmp_path / "model"), (0, tmp_path / "model"), (1, other))
        return [wire.send([(n, t.to(device).bfloat16()) for n, t in open_hf_folder(folder).items()], v, 1 << 20) for v, folder in rounds]

    async def whole() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        await engine.join(("127.0.0.1", store.port), [group], 0, 120.0)
        came = [await engine.load_weights(Collective((group.name,)), version) for version in (0, 1)]
        read = [await engine.load_weights(Disk(str(folder)), 2) for folder in (tmp_path / "model", other)]
        return [r.engine_tensors for r in came], [r.engine_tensors for r in read]

    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(publish)
        came, read = asyncio.run(whole())
        assert len(sent.result(120)) == 3
    assert came == read and came[0] != came[1]
