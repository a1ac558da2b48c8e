from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from rlinf.cluster.state import STORE_BYTES, object_store_bytes
from rlinf.errors import UserError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "free", "store"),
    [
        (2048, 1024, 64),  # a large node
        (512, 1024, 25),  # 5 % of its memory
        (2048, 64, 25),  # a container with --shm-size=64g: the other part is for weights
        (8, 0, 0.5),  # Docker's default: Ray takes a file for a store this small
    ],
)
def test_the_object_store_leaves_room_for_weights(memory: int, free: int, store: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE_BYTES, raising=False)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": memory << 18, "SC_PAGE_SIZE": 4096}[name])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free * GIB))
    assert object_store_bytes() == pytest.approx(store * GIB, rel=0.03)


def test_the_size_that_is_asked_for_is_taken_and_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_BYTES, "200000000")
    assert object_store_bytes() == 200_000_000
    monkeypatch.setenv(STORE_BYTES, "64g")
    with pytest.raises(UserError, match="RLINF_OBJECT_STORE_BYTES is '64g': give a whole number of bytes"):
        object_store_bytes()
