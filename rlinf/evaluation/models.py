"""The models of an evaluation, which are Hugging Face folders or checkpoints of runs, and the names of their results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlinf.config.load import find
from rlinf.errors import UserError
from rlinf.run_paths import CHECKPOINTS, step_of


@dataclass(frozen=True)
class Model:
    """path: the Hugging Face folder. name: of its results. series, step: the run and step of a checkpoint; for other folders the name
    and 0."""

    path: Path
    name: str
    series: str
    step: int


def parse_words(words: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """Sort the words of the command line into (CONFIG or None, model folders, key=value settings)."""
    config, folders, settings = None, [], []
    for word in words:
        if os.path.isdir(os.path.expanduser(word)):  # Path's raises OSError for a long key=value
            folders.append(word)
        elif "=" in word:
            settings.append(word)
        elif config is None:
            try:
                find(word)  # neither a folder nor a configuration: say so now
            except UserError as error:
                raise UserError(f"{word}: no folder of a model or a checkpoint, and no configuration either\n  {error}") from error
            config = word
        else:
            raise UserError(f"{word}: {config} is the configuration already, and this is no model folder")
    return config, folders, settings


def model_of(folder: str) -> Model:
    """The model in a folder, which is a Hugging Face folder, or the step_* folder of a checkpoint with a model in hf/."""
    path = Path(folder).expanduser().resolve()
    if not (path / "config.json").is_file() and (path / "hf" / "config.json").is_file():
        path = path / "hf"
    step = step_of(path.parent) if path.name == "hf" else None
    if step is None:
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path}: no config.json, so no model; give a Hugging Face folder or a checkpoint such as RUN/checkpoints/step_000050/hf"
            )
        return Model(path, path.name, path.name, 0)
    run = path.parents[2].name if path.parents[1].name == CHECKPOINTS else path.parents[1].name
    return Model(path, f"{run}-{path.parent.name}", run, step)


def models_of(folders: Sequence[str]) -> list[Model]:
    models = [model_of(folder) for folder in folders]
    for i, model in enumerate(models):
        for other in models[:i]:
            if other.path == model.path:
                raise UserError(f"{model.path} is given twice; give it once")
            if other.name == model.name:
                raise UserError(
                    f"{other.path} and {model.path} would both be named {model.name}; evaluate them into different evaluation.output_dir"
                )
    return models
