"""What the engine does by itself, without a server."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rlinf.config.settings import read_texts
from rlinf.data.records import Finish
from rlinf.errors import RunFailed, UserError
from rlinf.rollout import sglang_engine
from rlinf.rollout.limits import SLACK
from rlinf.rollout.sglang_engine import SGLangEngine, small_cache
from rlinf.rollout.sglang_samples import Arriving
from rlinf.weights.source import DeviceIpc, Disk, WeightSource


@pytest.mark.parametrize(("source", "given_back"), [(DeviceIpc(()), [True]), (Disk("model"), [])], ids=["device_ipc", "disk"])
def test_the_memory_that_a_look_at_weights_on_the_gpu_took_is_given_back(
    source: WeightSource, given_back: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nothing holds the buckets any more: the worker computes nothing there, and needs none of it again."""
    engine, held, found = SGLangEngine.__new__(SGLangEngine), [], []
    engine._arch, engine._device = None, "cpu"

    def check_tensors(_: object, __: object) -> dict[str, torch.Tensor]:
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        return {"a": tensor}

    monkeypatch.setattr(sglang_engine, "check_tensors", check_tensors)
    monkeypatch.setattr(sglang_engine, "give_back_free_memory", lambda _: found.append(held[0]() is None))
    assert engine._look_at(source, 1) == (1, 32) and found == given_back


def test_a_server_is_idle_before_it_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when it is asked for it with a step still under way."""
    engine, asked = SGLangEngine.__new__(SGLangEngine), []
    engine._asleep, engine._running = frozenset(), {}

    async def ask(path: str, body: dict[str, object], words: bool = False) -> None:
        asked.append((path, body.get("tags"), words))

    monkeypatch.setattr(engine, "_ask", ask)
    monkeypatch.setattr(engine, "_check_open", lambda: None)
    for tags in ({"kv"}, {"kv"}, {"kv", "weights"}):
        asyncio.run(engine.sleep(frozenset(tags)))
    flush = ("/flush_cache?timeout=60", None, True)
    assert asked == [flush, ("/release_memory_occupation", ["kv_cache"], False), flush, ("/release_memory_occupation", ["weights"], False)]


@pytest.mark.parametrize(
    ("loading", "others_come", "kept"),
    [(False, False, ((3, 4),)), (True, False, ()), (False, True, ((3, 2),))],
    ids=["between loads", "begun during a load", "before and after a load"],
)
def test_tokens_of_a_dead_server_are_kept_where_their_weights_are_known(
    loading: bool, others_come: bool, kept: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What begins during a load is decoded with the weights that come, as soon as the server goes on; what had arrived before a load was
    decoded with those before."""
    engine, sample, done = SGLangEngine.__new__(SGLangEngine), Arriving("s", [5], 8, False), asyncio.Queue[object]()
    engine._version, engine._loading, engine._closed, engine._seed = 3, loading, False, 0
    engine._arch, engine._server = SimpleNamespace(vocab=9), SimpleNamespace(death="killed", on_death=print)
    engine._counters, engine._speaking = SimpleNamespace(add=lambda **_: None), nullcontext

    async def stream(*_: object) -> AsyncIterator[dict[str, object]]:
        for n in (2, 4):
            meta = {"completion_tokens": n, "output_token_logprobs": [(-0.5, 1), (-0.5, 2)], "finish_reason": None}
            yield {"index": 0, "meta_info": meta, "output_ids": [1, 2]}
            if others_come:
                sample.expect_other_weights()
        raise RuntimeError("the connection is gone")

    monkeypatch.setattr(sglang_engine, "body_of", lambda *_: {})
    engine._http = SimpleNamespace(stream=stream)
    asyncio.run(engine._feed(SimpleNamespace(request_id="g"), [sample], done, asyncio.Event()))
    assert done.get_nowait() is sample and sample.sample().versions == kept and sample.finish is Finish.ABORT
    assert len(sample.sample()) == sum(n for _, n in kept)


def test_an_abort_does_not_wait_for_a_request_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples have no end; the next request of that name is another one."""
    engine, sent = SGLangEngine.__new__(SGLangEngine), []
    failing, after, other = (Arriving(name, [5], 8, False) for name in ("a", "a", "b"))
    engine._loading, engine._running = False, {"a": [failing], "b": [other]}

    async def send(samples: list[Arriving]) -> None:
        sent.append([a.sample_id for a in samples])
        engine._running["a"] = [after]  # the request has failed, and was asked for again
        if len(sent) == 3:
            other.finish = Finish.ABORT

    monkeypatch.setattr(engine, "_check_usable", lambda: None)
    monkeypatch.setattr(engine, "_send_aborts", send)
    monkeypatch.setattr(sglang_engine, "RETRY", 0.0)
    asyncio.run(asyncio.wait_for(engine.abort(), 5))
    assert sent == [["a", "b"], ["b"], ["b"]] and not after.unwanted


def test_the_tensor_that_a_second_load_does_not_write_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SGLangEngine.__new__(SGLangEngine)
    of_ranks = [{"norm": "a" * 64, "qkv": "b" * 64}, {"norm": "a" * 64, "qkv": "c" * 64}]

    async def ask(path: str, body: dict[str, object]) -> dict[str, object]:
        return {"ranks": [{"checksums": found, "parallelism_info": [{"tp_rank": rank}]} for rank, found in enumerate(of_ranks)]}

    async def take(*_: object) -> tuple[tuple[object, ...], dict[str, str]]:
        of_ranks[1]["qkv"] = "d" * 64
        return (), await engine._checksums()

    monkeypatch.setattr(engine, "_ask", ask)
    monkeypatch.setattr(engine, "_take", take)
    before = asyncio.run(engine._checksums())
    assert before == {"norm (TP rank 0)": "a" * 16, "qkv (TP rank 0)": "b" * 16, "norm (TP rank 1)": "a" * 16, "qkv (TP rank 1)": "c" * 16}
    with pytest.raises(RunFailed, match=r"checksum of qkv \(TP rank 1\) is another one: it does not load every tensor"):
        asyncio.run(engine._prove(Disk("model"), 1, before))
    with pytest.raises(RunFailed, match=r"version 0: SGLang's checksum of qkv \(TP rank 1\) is another one"):
        engine._dtype = "float32"
        engine._compare((), asyncio.run(engine._checksums()), before)


def test_options_of_the_server_mean_what_they_do_elsewhere_in_the_configuration() -> None:
    """`1e-1` is a number and 010 is not 8; an empty value is none."""
    options = {
        "attention_backend": "triton",
        "schedule_conservativeness": "1e-1",
        "watchdog_timeout": "010",
        "log_requests": "true",
        "a": "",
    }
    assert read_texts(options, "rollout.sglang") == {
        "attention_backend": "triton", "schedule_conservativeness": 0.1, "watchdog_timeout": "010", "log_requests": True, "a": None,
    }  # fmt: skip
    with pytest.raises(UserError, match="rollout.sglang: a:1: not valid YAML"):
        read_texts({"a": "[1"}, "rollout.sglang")


@pytest.mark.parametrize(("device", "key"), [("cpu", "rollout.sglang.max_total_tokens"), ("cuda", "rollout.gpu_memory_utilization")])
def test_a_cache_too_small_for_a_sample_is_named_with_the_key_of_its_size(device: str, key: str) -> None:
    assert small_cache(1000 + SLACK, 1000, device) == ""
    assert small_cache(999 + SLACK, 1000, device).endswith(f"needs {1000 + SLACK}: raise {key}")
