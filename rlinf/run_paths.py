"""A run on disk: what its files and folders are called, for everyone who writes or reads them.

    config.yaml  environment.jsonl  metrics.jsonl  status.json  FINISHED
    samples/step_000012.jsonl         the samples that were begun for step 12; validation_000012.jsonl: those of the validation behind it
    samples/tokens_000012.jsonl       what training in step 12 saw of its samples, token by token
    samples/groups_000012.jsonl       the groups that were begun for step 12: data/journal.py
    samples/order_000012.jsonl        the groups that step 12 trained on, in order, and all that were generated for it
    checkpoints/step_000012/          COMPLETE, run_state.json, waiting/ and a folder for each component; .partial while it is written
    checkpoints/latest, best          links to the newest, and to the one with the best held-out score

`<name>.replaced-1`, -2 and so on is what an earlier life of the run made, and a later one made again. A step has six digits, from step
1,000,000 on more. Whatever is named otherwise, such as a copy step_000012.bak, is not the run's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.jsonl"
METRICS_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
FINISHED = "FINISHED"
CHECKPOINTS = "checkpoints"
STATE = "run_state.json"  # in a checkpoint, as the next two
COMPLETE = "COMPLETE"
GROUPS_AHEAD = "waiting"  # groups that were generated and not yet trained on
PARTIAL = ".partial"
REPLACED = ".replaced-"
STEP = "(?:[0-9]{6}|[1-9][0-9]{6,})"

SampleKind = Literal["step", "validation", "tokens", "groups", "order"]  # how the name of a file in samples/ begins
SAMPLE_KINDS: tuple[SampleKind, ...] = get_args(SampleKind)


@dataclass(frozen=True)
class RunPaths:
    """The paths in the folder of a run, whether the files exist or not."""

    run_dir: Path

    @property
    def samples_dir(self) -> Path:
        return self.run_dir / "samples"

    def sample_file(self, kind: SampleKind, step: int) -> Path:
        return self.samples_dir / f"{kind}_{step:06d}.jsonl"

    def samples(self, step: int) -> Path:
        return self.sample_file("step", step)

    def validation(self, step: int) -> Path:
        return self.sample_file("validation", step)

    def tokens(self, step: int) -> Path:
        return self.sample_file("tokens", step)

    def groups(self, step: int) -> Path:
        return self.sample_file("groups", step)

    def order(self, step: int) -> Path:
        return self.sample_file("order", step)

    def steps_of(self, kind: SampleKind) -> list[int]:
        """The steps, in order, that have such a file in samples/."""
        return [step for step, _ in _named(self.samples_dir, kind, r"\.jsonl")]

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / CHECKPOINTS

    @property
    def latest(self) -> Path:
        return self.checkpoints / "latest"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def partial_checkpoint(self, step: int) -> Path:
        """Where a checkpoint is written until it is complete."""
        return self.checkpoints / (step_name(step) + PARTIAL)

    def complete_checkpoints(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return [step for step, path in _named(self.checkpoints, "step") if (path / COMPLETE).exists()]

    def unfinished_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of checkpoints that are being written or removed, or whose writing or removal was interrupted."""
        removed = [(step, path) for step, path in _named(self.checkpoints, "step") if not (path / COMPLETE).exists()]
        return removed + _named(self.checkpoints, "step", re.escape(PARTIAL))

    def replaced_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of checkpoints that were renamed by aside()."""
        return _named(self.checkpoints, "step", re.escape(REPLACED) + "[0-9]+")


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint from the name of its folder; None when it is not the name of a complete checkpoint."""
    found = re.fullmatch(f"step_({STEP})", checkpoint.name)
    return int(found[1]) if found else None


def journal_of(samples: Path) -> Path | None:
    """samples/groups_000012.jsonl for samples/step_000012.jsonl; None for validation, which is never trained on."""
    kind, _, step = samples.name.partition("_")
    return samples.with_name(f"groups_{step}") if kind == "step" else None


def aside(path: Path) -> Path:
    """The name for something that is about to be made again: the first free one of the form <name>.replaced-N."""
    number = 1
    while (other := path.with_name(f"{path.name}{REPLACED}{number}")).exists():
        number += 1
    return other


def replaced(path: Path) -> list[Path]:
    """What was renamed from this path by aside(), the last first."""
    pattern = re.escape(path.name + REPLACED) + "([0-9]+)"
    found = [(int(match[1]), p) for p in path.parent.glob("*") if (match := re.fullmatch(pattern, p.name))]
    return [p for _, p in sorted(found, reverse=True)]


def _named(folder: Path, kind: str, ending: str = "") -> list[tuple[int, Path]]:
    """(step, path) of everything in the folder with the name <kind>_<step><ending>, in the order of steps. ending: a regular expression."""
    found = ((re.fullmatch(f"{kind}_({STEP}){ending}", path.name), path) for path in folder.glob(f"{kind}_*"))
    return sorted((int(match[1]), path) for match, path in found if match)
