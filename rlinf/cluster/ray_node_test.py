from __future__ import annotations

from pathlib import Path

import pytest

from rlinf.cluster.ray_node import visible_gpus


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, 8), ("0,1", 2), ("GPU-5f3a,GPU-77b0,GPU-901c", 3), ("3", 1), ("", 0), ("-1", 0), ("NoDevFiles", 0)],
)
def test_a_node_offers_the_gpus_that_its_processes_may_see(
    visible: str | None, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray refuses to start with more than CUDA_VISIBLE_DEVICES names; without a driver there are none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for i in range(8):
        (tmp_path / f"0000:0{i}:00.0").mkdir()
    assert visible_gpus(tmp_path) == gpus
    assert visible_gpus(tmp_path / "absent") == 0
