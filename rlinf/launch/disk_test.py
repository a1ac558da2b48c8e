"""A full disk is told once, without the traceback of the worker that met it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rlinf.errors import Hang, RunFailed, UserError
from rlinf.launch.disk import DiskFull, explain_full_disk

NO_SPACE = "[Errno 28] No space left on device: 'a'"


@pytest.fixture(autouse=True)
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4096))


@pytest.mark.parametrize("kind", [OSError, RunFailed, UserError])
def test_the_first_line_of_the_cause_is_quoted_and_the_message_is_made_once(tmp_path: Path, kind: type[Exception]) -> None:
    with pytest.raises(DiskFull) as told, explain_full_disk(tmp_path), explain_full_disk(tmp_path):
        raise kind(f"actor 0: {NO_SPACE}\nTraceback (most recent call last):\n  File ...")
    first, last = str(told.value).splitlines()
    assert first.startswith(f"the disk of {tmp_path} is full") and last == f"What could not be written: actor 0: {NO_SPACE}"


@pytest.mark.parametrize("error", [Hang(NO_SPACE), RunFailed("another fault"), UserError("another fault")])
def test_what_is_no_full_disk_passes_as_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as same, explain_full_disk(tmp_path):
        raise error
    assert same.value is error
