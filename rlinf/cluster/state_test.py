from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlinf.cluster.state import STORE_BYTES, environment_with, join_address, object_store_bytes, silence, split_address, token_variables
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


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("node-0", ("node-0", 6379)),
        ("node_0.rack.example.org.:7000", ("node_0.rack.example.org.", 7000)),
        ("10.0.0.1:6380", ("10.0.0.1", 6380)),
        ("[fd00::2]:6380", ("fd00::2", 6380)),
        ("[fd00::2]", ("fd00::2", 6379)),
    ],
)
def test_an_address_is_a_host_and_a_port_and_back(text: str, parts: tuple[str, int]) -> None:
    assert split_address(text, "HEAD_ADDRESS", 6379) == parts
    assert split_address(join_address(*parts), "HEAD_ADDRESS", 1) == parts


@pytest.mark.parametrize("text", ["fd00::2:6379", "fd00::2", "[fd00::2", "a..b:6379", "node 0", "http://node0:80", "", ":6379", "a" * 64])
def test_what_is_no_address_is_refused_with_its_source(text: str) -> None:
    """An IPv6 address without brackets ends in what may be a port or a part of it."""
    with pytest.raises(UserError, match="HEAD_ADDRESS: .* is no address; give host:port, and IPv6 in brackets") as caught:
        split_address(text, "HEAD_ADDRESS", 6379)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_is_silent_until_something_listens_there(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as door:
        try:
            door.bind((host, 0))
        except OSError as error:
            pytest.skip(f"no {host} on this machine: {error}")
        address = join_address(host, door.getsockname()[1])
        assert silence(address) == f"nothing answers at {address} (Connection refused)"
        door.listen()
        assert silence(address) is None


def test_a_name_that_is_not_known_is_told_and_raises_nothing() -> None:
    assert "the name node0.invalid is not known here (" in str(silence("node0.invalid:6379"))


def test_ray_takes_the_token_of_the_file_and_no_inherited_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    made = environment_with(token_variables(Path("/state/token")))
    assert "RAY_AUTH_TOKEN" not in made and (made["RAY_AUTH_TOKEN_PATH"], made["RAY_AUTH_MODE"]) == ("/state/token", "token")
