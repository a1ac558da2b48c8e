"""Named tensors in a folder of safetensors files with an index: read lazily, written durably, and checked when read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlinf.errors import UserError
from rlinf.files import read_json, sync, unreadable

FILE_BYTES = 128 << 20  # what is held in memory, twice, while a file is written


class Stored(NamedTuple):
    """Where a tensor is stored, and the xxh3-64 of its content."""

    file: str
    xxh3: str


def digest(tensor: Tensor) -> str:
    """xxh3-64 of dtype, shape and bytes."""
    state = xxhash.xxh3_64(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def write_tensors(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], file_bytes: int = FILE_BYTES) -> dict[str, Stored]:
    """Write the tensors to <stem>-00001.safetensors, ... in `folder`, and fsync each file. Returns where each tensor is."""
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, Stored] = {}
    pending: dict[str, Tensor] = {}
    count = 0

    def flush() -> None:
        nonlocal count
        if pending:
            count += 1
            file = f"{stem}-{count:05d}.safetensors"
            write_tensor_file(folder / file, pending)
            where.update({name: Stored(file, digest(tensor)) for name, tensor in pending.items()})
            pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > file_bytes:
            flush()
        pending[name] = tensor.contiguous().cpu().clone()
    flush()
    return where


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, and fsync it. Whoever may read other new files of this process may read it: safetensors' own is its
    owner's alone."""
    with path.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
    sync(path)


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, mapped. Raises UserError when it is missing, cut short or otherwise damaged."""
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def _read(file: safe_open, path: Path, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: tensor {name} cannot be read ({error}); the file is damaged or belongs to another model") from error


class TensorFolder(Mapping[str, Tensor]):
    """Read access to tensors by name. Files are mapped; a tensor is read when it is asked for, and compared with its xxh3 where one is
    known.

    Nothing is ever unpickled. A missing or damaged tensor is a UserError that names it and its file.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], xxh3: Mapping[str, str] | None = None) -> None:
        self.folder, self.files, self.xxh3 = folder, dict(files), xxh3 or {}

    @classmethod
    def of(cls, folder: Path, stored: Mapping[str, Stored]) -> TensorFolder:
        """A folder that write_tensors wrote."""
        return cls(folder, {n: s.file for n, s in stored.items()}, {n: s.xxh3 for n, s in stored.items()})

    @cached_property
    def _open(self) -> dict[str, safe_open]:
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it."""
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def _file_of(self, name: str) -> safe_open:
        if name not in self.files:
            raise UserError(f"{self.folder}: no tensor named {name}; the folder belongs to another model or is incomplete")
        file = self.files[name]
        if file not in self._open:
            self._open[file] = open_tensors(self.folder / file)
        return self._open[file]

    def __getitem__(self, name: str) -> Tensor:
        tensor = _read(self._file_of(name), self.folder / self.files[name], name)
        if name in self.xxh3 and digest(tensor) != self.xxh3[name]:
            raise UserError(
                f"{self.folder / self.files[name]}: tensor {name} is damaged: its bytes are not those that were written (xxh3); "
                "restore the file"
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_hf_folder(folder: str | Path) -> TensorFolder:
    """The weights of a Hugging Face folder (single file or sharded with index)."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return TensorFolder(folder, read_json(index)["weight_map"])
    if not single.is_file():
        raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json; only safetensors weights are read")
    with open_tensors(single) as file:
        return TensorFolder(folder, dict.fromkeys(file.keys(), single.name))
