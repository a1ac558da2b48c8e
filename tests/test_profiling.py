"""A run says how fast it computes, how much memory each rank takes, and leaves traces of the steps that it was asked to record."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rlinf.config.load import load
from rlinf.runners.launch import train
from tests.test_tiny_run import ONE_PROCESS, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    config = write_run(folder, runner__profile_steps=[2], runner__peak_tflops=0.5, runner__max_steps=2, runner__val_check_interval=0, runner__save_interval=0, **ONE_PROCESS)
    assert train(load(str(config))) == 0
    return folder / "logs" / "tiny"


def test_the_trace_of_a_step_is_there_and_no_other(run_dir: Path) -> None:
    (trace,) = (run_dir / "profile").iterdir()
    assert trace.name == "step_000002-actor-0.json.gz"
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"aten::mm", "aten::embedding"} <= names
