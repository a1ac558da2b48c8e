"""Weights from a Hugging Face folder: one model.safetensors, or a sharded set with its index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlinf.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def iterate_folder(path: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor, read one at a time, file by file in the order of the index.

    Raises UserError when the folder holds no safetensors weights, a shard is missing or unreadable, or a name comes twice.
    """
    seen: dict[str, str] = {}
    for file, expected in _files(Path(path)):
        if not file.is_file():
            raise UserError(f"{file}: missing, though {INDEX} beside it names this file; download the model again")
        with _open(file) as shard:
            names = set(shard.keys())
            missing = sorted((expected or names) - names)
            if missing:
                raise UserError(f"{file}: lacks {missing[0]}, which {INDEX} says is in it; download the model again")
            for name in sorted(names):
                if name in seen:
                    raise UserError(f"{file}: tensor {name} is also in {seen[name]}")
                seen[name] = file.name
                yield name, shard.get_tensor(name)


def _files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The files of a folder, each with the names that the index promises (None: no index)."""
    index = folder / INDEX
    if index.is_file():
        by_file: dict[str, set[str]] = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            by_file.setdefault(file, set()).add(name)
        return [(folder / file, names) for file, names in by_file.items()]
    if (folder / SINGLE).is_file():
        return [(folder / SINGLE, None)]
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf")) if folder.is_dir() else []
    found = f"found {', '.join(others[:3])} instead; convert them to safetensors" if others else "check the path"
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} there; {found}")


def _open(file: Path) -> safe_open:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); download the model again") from error
