"""`rlinf check sync` holds, and it fails when something on the way is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlinf.checks import sync
from rlinf.checks.rank_pool import RankPool
from rlinf.checks.sync import TRANSPORTS, Case, Finding, check_cases, make_cases, small_engine
from rlinf.weights.routes import DEVICE_IPC, SHARED_MEMORY

ROUTE = Case("qwen2-tied", 2, 1, 1, SHARED_MEMORY, 2)


def swap_shards(at: Any) -> None:
    """In a rank: row-parallel shards are put together in the wrong order."""
    from rlinf.training import state

    whole = state.to_hf
    state.to_hf = lambda rule, shards, arch: whole(rule, list(shards)[::-1] if rule.layout == "row" else shards, arch)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with RankPool(2) as made:
        yield made
    torch.set_num_threads(before)


def find(pool: RankPool, case: Case, folder: Path, make_engine: Any = small_engine) -> Finding:
    (finding,) = check_cases(pool, [case], folder, make_engine)
    return finding


def test_the_cases_are_every_layout_with_every_transport_and_family() -> None:
    cases = make_cases()
    assert len(set(cases)) == len(cases) == 8 * 3 * 5 * 2
    quick = make_cases(quick=True)
    assert len({(c.tp, c.pp, c.dp) for c in quick}) == 8
    assert {c.transport for c in quick} == set(TRANSPORTS) and len({c.family for c in quick}) == 3


@pytest.mark.slow
def test_the_whole_check_takes_less_than_four_minutes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlinf", "check", "sync", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0 and "240 of 240 ways hold" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["holds"] and found["seconds"] < 240


@pytest.mark.slow
def test_a_sync_holds_by_every_transport(pool: RankPool, tmp_path: Path) -> None:
    for finding in check_cases(pool, [replace(ROUTE, transport=transport) for transport in TRANSPORTS], tmp_path, small_engine):
        assert finding.fault == "" and finding.gap <= 1e-4
    assert not list(Path("/dev/shm").glob("rlinf-check-*"))


@pytest.mark.slow
def test_a_bucket_that_is_damaged_on_the_device_is_found(pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(parts: Any) -> Any:
        source = sync_merge(parts)
        with open(source.buckets[1].key, "r+b") as file:
            file.seek(1000)
            byte = file.read(1)[0]
            file.seek(1000)
            file.write(bytes([byte ^ 1]))
        return source

    sync_merge = sync.merge_sources
    monkeypatch.setattr(sync, "merge_sources", flip)
    fault = find(pool, replace(ROUTE, transport=DEVICE_IPC, replicas=1), tmp_path).fault
    assert "-ipc-v1-1: tensor model.layers.0.self_attn.q_proj.weight, checksum" in fault and "as sent" in fault


@pytest.mark.slow
def test_a_dropped_bucket_is_found(pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = sync.merge_sources
    monkeypatch.setattr(sync, "merge_sources", lambda parts: type(m := merge(parts))(m.buckets[:-1]))
    assert "missing tensor" in find(pool, ROUTE, tmp_path).fault


@pytest.mark.slow
def test_a_stale_cache_is_found(pool: RankPool, tmp_path: Path) -> None:
    def forgetful(folder: Path) -> Any:
        engine = small_engine(folder)
        engine._batcher.retract = lambda: None
        return engine

    assert "something of the old ones is left" in find(pool, ROUTE, tmp_path, forgetful).fault


@pytest.mark.slow
def test_an_engine_that_takes_nothing_is_found(pool: RankPool, tmp_path: Path) -> None:
    def deaf(folder: Path) -> Any:
        engine = small_engine(folder)
        load = engine._batcher.model.load
        engine._batcher.model.load = lambda tensors, keep: load(sync.open_hf_folder(folder).items())
        return engine

    assert "the engine does not run the actor's weights" in find(pool, ROUTE, tmp_path, deaf).fault


@pytest.mark.slow
def test_swapped_shards_are_found(tmp_path: Path) -> None:
    with RankPool(2) as own:
        own.run(swap_shards)
        fault = find(own, ROUTE, tmp_path).fault
    assert "o_proj.weight" in fault or "does not run the actor's weights" in fault
