"""Every test here runs on `device`: on a GPU where there is one, and where there is none its twin on CPU. The CPU hook of megatron-core is
inert on a GPU machine, so that there the twins would not run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlinf import device as devices
from rlinf.checks.tiny_model import FAMILIES, write_tiny_model
from rlinf.hardware import free_port

os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")  # as in every seat on a GPU (cluster/host.py); NCCL reads it once in a process


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu" and devices.usable():
        pytest.skip("the twin of a GPU test, for machines without a GPU")
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="module")
def at(device: torch.device) -> Iterator["Coordinates"]:  # noqa: F821  (imported when a test asks for it)
    """One rank, over NCCL or gloo; nothing of it is left for the tests of other modules."""
    from megatron.core import parallel_state as mpu

    from rlinf.training import parallel

    yield parallel.initialize(1, 1, rank=0, world_size=1, device=device, address=f"127.0.0.1:{free_port('127.0.0.1')}")
    mpu.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: write_tiny_model(folder / family, family) for family in FAMILIES}
    for path in made.values():
        (path / "tokenizer.json").write_text("{}")  # an engine asks that there is one; nothing here reads it
    return made
