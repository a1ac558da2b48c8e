"""What is written: whole or not at all, through links, into pipes, and never in the place of something else."""

import os
import stat
import threading
from pathlib import Path

import pytest

from rlinf.data.jsonl import atomic_write, refuse_itself, write_splits
from rlinf.errors import UserError


def write(path: Path, text: str = "new\n") -> None:
    with atomic_write(path) as file:
        file.write(text)


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for text in ("first\n", "second\n"):  # where the file is missing, and where it is
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == text
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "link", "there"]


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_pipe_is_written_and_stays_a_pipe(tmp_path: Path, through_a_link: bool) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    target = tmp_path / "link" if through_a_link else pipe
    if through_a_link:
        target.symlink_to(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    write(target)
    reader.join(10)
    assert got == ["new\n"] and stat.S_ISFIFO(pipe.stat().st_mode) and target.is_symlink() == through_a_link


def test_a_folder_and_a_loop_of_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, Path("."), Path(""), Path("loop") / "file"):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); name another file"):
            write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["loop"]


def test_the_source_is_not_overwritten_by_any_of_its_names(tmp_path: Path) -> None:
    source, link = tmp_path / "in.jsonl", tmp_path / "link"
    source.write_text("{}\n")
    link.symlink_to(source)
    for target in (source, link, tmp_path / ".." / tmp_path.name / "in.jsonl"):
        with pytest.raises(UserError, match="is the file that is read"):
            refuse_itself(source, target)
    refuse_itself(source, tmp_path / "out.jsonl")


def test_splits_are_written_again_but_not_over_others(tmp_path: Path) -> None:
    for _ in range(2):
        files = write_splits(tmp_path / "d", [{"a": 1}], [{"a": 2}])
    assert files["val"].read_text() == '{"a": 2}\n'
    files["train"].unlink()
    files["val"].write_text("mine\n")
    with pytest.raises(UserError, match="val.jsonl: there already, with other content; nothing was written"):
        write_splits(tmp_path / "d", [{"a": 1}], [{"a": 2}])
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["val.jsonl"] and files["val"].read_text() == "mine\n"
