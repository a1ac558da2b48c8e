"""What is said at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf.launch.session import tell_best
from rlinf.run_folder.folder_test import close, open_folder, scored


def test_the_best_checkpoint_is_named_where_it_is_not_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = open_folder(tmp_path)
    tell_best(folder)
    for step, accuracy in ((1, 0.5), (2, 0.6), (3, 0.4)):
        scored(folder, step, **{"eval/accuracy": accuracy})
        tell_best(folder)
    assert capsys.readouterr().err == f"best on held-out data: the checkpoint of step 2, {folder.paths.best}\n"
    close(folder)
