"""What the engine does by itself, without a server."""

from __future__ import annotations

import asyncio
import weakref

import pytest
import torch

from rlinf.config.settings import read_texts
from rlinf.errors import UserError
from rlinf.rollout import sglang_engine
from rlinf.rollout.sglang_engine import SGLangEngine
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
