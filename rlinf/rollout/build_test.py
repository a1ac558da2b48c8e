"""What a worker's configuration becomes; the device is one in name only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.cuda._utils import _get_device_index

from rlinf.config.schema import Config
from rlinf.rollout import build


@pytest.mark.parametrize(("backend", "limits"), [("ray", [(0.4, 0)]), ("local", [])])
def test_the_memory_of_an_embedded_engine_is_limited_where_its_process_is_its_own(
    monkeypatch: pytest.MonkeyPatch, backend: str, limits: list[tuple[float, int]]
) -> None:
    set_limits: list[tuple[float, int]] = []
    built: dict[str, Any] = {}
    # torch's own look at the device, which wants its number
    fraction = lambda share, device: set_limits.append((share, _get_device_index(device)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", fraction)
    monkeypatch.setattr(build, "EmbeddedEngine", lambda model_dir, **words: built.update(words))
    config = Config()
    config.cluster.backend, config.rollout.rollout_backend, config.rollout.gpu_memory_utilization = backend, "embedded", 0.4
    config.rollout.model_dir = "model"
    build.build_engine(config, tokenizer=SimpleNamespace(decode=str), device="cuda", log=Path("log"), run_id="run")
    assert set_limits == limits and built["device"] == "cuda"
