"""The address file, whatever is in it, and what a node waits for. Real heads are in tests/test_ray_utils.py."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlinf.cluster import head as module
from rlinf.cluster.head import ADDRESS_FILE, TOKEN_FILE, Head, find_head, look_for_head, publish, warn_of_another, withdraw
from rlinf.errors import UserError

HEAD = Head("10.0.0.1", 6379, "monday", 1000.0)
GARBLED = ["10.0.0.1 and more", "10.0.0.1\nport=x\n", "10.0.0.1\nstarted=now\n", "fd00::2:6379\n", "<html>\n", "\ufffd\ufffd"]


@pytest.fixture(autouse=True)
def own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_ADDRESS", "RLINF_RAY_PORT", "RLINF_CLUSTER_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What is wrong at an address, by the address, both with the port and with what listens there; elsewhere nothing answers."""
    wrong: dict[str, str | None] = {}
    monkeypatch.setattr(module, "silence", lambda address: None if address in wrong else f"nothing answers at {address}")
    monkeypatch.setattr(module, "listens", lambda address: address in wrong)
    monkeypatch.setattr(module, "strangeness", lambda address, token: wrong[address])
    return wrong


def write(folder: Path, text: str = HEAD.render(), token: str = "secret") -> Path:
    (folder / ADDRESS_FILE).write_text(text)
    (folder / TOKEN_FILE).write_text(token)
    return folder


def test_what_the_head_writes_is_read_back() -> None:
    assert Head.parse(HEAD.render(), "file") == HEAD
    assert Head.parse("10.0.0.1\n", "file").address == "10.0.0.1:6379"  # as other projects write it
    assert Head.parse(Head("fd00::2", 7000).render(), "file").address == "[fd00::2]:7000"


@pytest.mark.parametrize("text", GARBLED)
def test_what_is_no_address_file_is_waited_out_and_told_with_its_remedy(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLINF_START_TIMEOUT", "1")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setattr(module.time, "monotonic", iter([0.0, 0.5, 40.0, 40.0, 50.0]).__next__)
    with pytest.raises(UserError, match=f"{ADDRESS_FILE} is not an address file, it begins with .*: delete it; the head writes its own"):
        find_head(write(tmp_path, text), tmp_path, None)
    assert capsys.readouterr().err.count("is not an address file") == 1  # and while it waits


def test_bytes_that_are_no_text_are_no_address_file(tmp_path: Path) -> None:
    (tmp_path / ADDRESS_FILE).write_bytes(b"\xff\xfe\x00")
    assert "is not an address file" in look_for_head(tmp_path, tmp_path, None)[1]


def test_a_name_that_is_not_known_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEAD_ADDRESS", "node0.invalid:6379")
    monkeypatch.setenv("RLINF_START_TIMEOUT", "1")
    with pytest.raises(
        UserError, match=r"within RLINF_START_TIMEOUT = 1 s: the name node0.invalid is not known here \(.*\), from HEAD_ADDRESS"
    ):
        find_head(tmp_path, tmp_path, None)
    assert "waiting for the head: the name node0.invalid is not known here" in capsys.readouterr().err


def test_a_head_is_joined_when_it_takes_the_token_which_is_then_kept(door: dict, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    write(tmp_path)
    assert look_for_head(tmp_path, state, None) == (None, f"nothing answers at 10.0.0.1:6379, from {tmp_path / ADDRESS_FILE}")
    door["10.0.0.1:6379"] = "the head at 10.0.0.1:6379 does not take the token"
    found, seen = look_for_head(tmp_path, state, None)
    assert found is None and seen.startswith("the head at 10.0.0.1:6379 does not take the token; the address is from ")
    assert str(tmp_path / ADDRESS_FILE) in seen and str(tmp_path / TOKEN_FILE) in seen
    door["10.0.0.1:6379"] = None
    assert look_for_head(tmp_path, state, None) == (HEAD, "")
    assert (state / "token").read_text() == "secret" and (state / "token").stat().st_mode & 0o777 == 0o600


def test_a_head_gives_back_only_the_files_that_are_its_own(tmp_path: Path) -> None:
    write(tmp_path, Head("10.0.0.2", 6379).render(), token="newer")
    withdraw(tmp_path, "10.0.0.1:6379", "secret")
    assert (tmp_path / ADDRESS_FILE).exists() and (tmp_path / TOKEN_FILE).exists()
    (tmp_path / ADDRESS_FILE).write_text("<html>")
    withdraw(tmp_path, "10.0.0.2:6379", "newer")
    assert (tmp_path / ADDRESS_FILE).exists() and not (tmp_path / TOKEN_FILE).exists()
    write(tmp_path)
    withdraw(tmp_path, "10.0.0.1:6379", "secret")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "<html>", Head("10.0.0.9", 1, started=999.0).render()])
def test_a_head_writes_its_file_over_anything_but_a_newer_heads(
    text: str, door: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, text)
    door[HEAD.address] = None
    newer = Head("10.0.0.2", 6379, "tuesday", 1001.0).render()

    def sleep(_: float) -> None:
        assert (tmp_path / ADDRESS_FILE).read_text() == HEAD.render()
        (tmp_path / ADDRESS_FILE).write_text(newer)

    monkeypatch.setattr(time, "sleep", sleep)
    publish(tmp_path, HEAD)
    assert (tmp_path / ADDRESS_FILE).read_text() == newer


def test_a_new_head_says_that_the_files_are_of_another_that_lives(door: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    new = Head("10.0.0.2", 6379, "tuesday", 2000.0)
    warn_of_another(tmp_path, new)
    assert capsys.readouterr().err == ""
    door["10.0.0.1:6379"] = None
    warn_of_another(tmp_path, HEAD)
    assert capsys.readouterr().err == ""
    warn_of_another(tmp_path, new)
    assert "was of another cluster, at 10.0.0.1:6379, which still answers" in capsys.readouterr().err
