"""What the engine does by itself, without a server."""

from __future__ import annotations

import weakref

import pytest
import torch

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
