"""What every worker around a Megatron engine does with checkpoints."""

from __future__ import annotations

from pathlib import Path

from rlinf.config.schema import Config
from rlinf.training import checkpoint
from rlinf.training.engine import MegatronEngine


class Checkpointed:
    """save, finish_save and load. A worker that shares its device overrides `bring_back` and `hand_over`.

    role: names the part of the checkpoint, and says whose model it is.
    """

    role = "actor"
    engine: MegatronEngine
    config: Config
    writing: checkpoint.Writing | None = None

    def save(self, step_dir: str) -> None:
        """Write the checkpoint; with runner.async_checkpoint only begin to, until finish_save()."""
        self.bring_back()
        background = self.config.runner.async_checkpoint
        model_dir = self.config.model_dir_of(self.role)
        self.writing = checkpoint.Writing(self.engine, Path(step_dir), Path(model_dir), background, self.role)
        if background:
            self.hand_over()
        else:
            self.finish_save()

    def finish_save(self) -> None:
        """Wait for the files of the last save() and check them."""
        self.bring_back()
        self.writing.finish()
        self.writing = None
        self.hand_over()

    def load(self, step_dir: str) -> None:
        self.bring_back()
        checkpoint.load(self.engine, Path(step_dir), self.role)
        self.hand_over()

    @property
    def checkpoint_written(self) -> bool:
        """Whether the files of a checkpoint in the background are on disk. Raises RunFailed when they could not be written."""
        return self.writing is not None and self.writing.written

    def bring_back(self) -> None:
        """Before the engine is used."""

    def hand_over(self) -> None:
        """After it was used for a checkpoint."""
