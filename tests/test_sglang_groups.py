"""Weights into a server of several tensor-parallel ranks, over a process group that all of them are in."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rlinf.rollout.contract import GenerateRequest, SamplingParams, Stop
from rlinf.weights.broadcast import open_store
from rlinf.weights.receipts import check_receipts
from rlinf.weights.routes import BROADCAST, Feed, broadcast_groups
from rlinf.weights.server_groups import ServerWire
from rlinf.weights.source import Broadcast, Collective, Disk, Receipt
from rlinf.weights.tensor_folder import open_hf_folder
from tests.sglang_here import small_server
from tests.test_engine_contract import Reference, prompt
from tests.test_sglang import with_sglang
from tests.tiny import make_tiny_model


@with_sglang
def test_every_tensor_parallel_rank_of_a_server_takes_broadcast_weights(tmp_path: Path) -> None:
    """At first twice, to be compared with what the server has read from its files."""
    own, other = make_tiny_model(tmp_path / "model"), make_tiny_model(tmp_path / "other", seed=1)
    (group,), store = broadcast_groups([Feed(0, BROADCAST)], 1, 1, 1, engine_ranks=2), open_store("127.0.0.1", 0, keeps=True)
    engine = small_server(own, 64, tensor_parallel_size=2)

    def publish() -> list[Broadcast]:
        wire = ServerWire(group, open_store("127.0.0.1", store.port, keeps=False), torch.device("cpu"), 60.0)
        return [wire.send(open_hf_folder(folder).items(), v, 50_000) for v, folder in ((0, own), (0, own), (1, other))]

    async def whole() -> tuple[list[Receipt], list[int], Receipt]:
        await engine.join(("127.0.0.1", store.port), [group], 0, 60.0)
        came = [await engine.load_weights(Collective((group.name,)), version) for version in (0, 1)]
        request = GenerateRequest("r", prompt(9), 1, SamplingParams(temperature=0), Stop(), 12)
        generated = [sample.token_ids.tolist() async for sample in engine.generate(request)]
        return came, generated[0], await engine.load_weights(Disk(str(other)), 2)

    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(publish)
        (_, receipt), generated, read = asyncio.run(whole())
        check_receipts(sending.result(60)[2:], 1, [receipt])
    engine.close()
    assert receipt.engine_tensors == read.engine_tensors != {} and generated == Reference(other).greedy(prompt(9), 12)
