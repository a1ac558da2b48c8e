"""Small files are whole whenever somebody looks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlinf.errors import UserError
from rlinf.files import as_json, read_json, scratch_of, write_json, write_through, write_visible, write_whole


@pytest.mark.parametrize("write", [write_whole, write_visible])
def test_an_interruption_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object) -> None:
    file = tmp_path / "a.txt"
    write(file, "old\n")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(file, "new\n")
    assert file.read_text() == "old\n" and scratch_of(file).read_text() == "new\n"
    monkeypatch.undo()
    write(file, "newer\n")
    assert file.read_text() == "newer\n" and [*tmp_path.iterdir()] == [file]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: happened.append(Path(f"/proc/self/fd/{fd}").resolve().name) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda self, to: happened.append("replaced") or replace(self, to))
    write_whole(tmp_path / "a.txt", (f"{i}\n" for i in range(3)))
    assert happened == [".a.txt.new", "replaced", tmp_path.name] and (tmp_path / "a.txt").read_text() == "0\n1\n2\n"
    happened.clear()
    write_through(tmp_path / "b.txt", "ä")
    write_json(tmp_path / "c.json", {"a": None})
    assert happened == ["b.txt", "c.json"] and (tmp_path / "b.txt").read_bytes() == "ä".encode()
    assert read_json(tmp_path / "c.json") == {"a": None} and as_json({"a": None}) == (tmp_path / "c.json").read_text()


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "z.json").write_bytes(content)
    with pytest.raises(UserError, match="z.json: cannot be read .*missing or damaged"):
        read_json(tmp_path / "z.json")
