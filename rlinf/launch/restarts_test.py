"""Behind a hang every command that writes checkpoints goes on from the latest one, if it is to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rlinf.config.load import Resolved, load
from rlinf.errors import Hang
from rlinf.launch import debug, sft, train

COMMANDS: dict[str, tuple[ModuleType, str, Callable[[Resolved], int]]] = {
    "train": (train, "train_once", lambda resolved: train.train(resolved)),
    "sft": (sft, "finetune_once", lambda resolved: sft.finetune(resolved)),
    "debug-train-only": (debug, "train_only_once", lambda resolved: debug.train_only(resolved, Path("other"), 2)),
}


def lives(monkeypatch: pytest.MonkeyPatch, folder: Path, command: str, *words: str, saves: bool = True, hangs: int = 1) -> list[str | None]:
    """runner.resume_dir of each life of a run whose first ones hang, one of them after it has written a checkpoint."""
    module, once, run = COMMANDS[command]
    begun: list[str | None] = []

    def life(resolved: Resolved, *others: object) -> int:
        assert others == ((Path("other"), 2) if command == "debug-train-only" else ())
        begun.append(resolved.config.runner.resume_dir)
        if saves:
            (folder / "run" / "checkpoints" / "latest").mkdir(parents=True, exist_ok=True)
        if len(begun) <= hangs:
            raise Hang(f"life {len(begun)} hangs")
        return 0

    monkeypatch.setattr(module, once, life)
    place = [f"runner.output_dir={folder}", "runner.experiment_name=run"]
    try:
        assert run(load("smollm2-135m-grpo-cpu", [*place, *words])) == 0
    except Hang as hang:
        begun.append(str(hang))
    return begun


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_hangs_is_started_anew_from_its_latest_checkpoint_as_often_as_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    restart = ("runner.on_hang=restart", "runner.max_restarts=2")
    assert lives(monkeypatch, tmp_path / "a", command, *restart) == [None, "auto"]
    assert "life 1 hangs\nrlinf: restart 1 of at most 2, from the latest checkpoint" in capsys.readouterr().err
    assert lives(monkeypatch, tmp_path / "b", command, *restart, hangs=9) == [None, "auto", "auto", "life 3 hangs"]
    assert lives(monkeypatch, tmp_path / "c", command, *restart, saves=False) == [None, "life 1 hangs"]
    assert lives(monkeypatch, tmp_path / "d", command) == [None, "life 1 hangs"]
