"""The part of a checkpoint that belongs to one role, on disk: fp32 master weights and Adam moments under their Hugging Face names.

The layout (TP, PP, DP) is not stored, so a checkpoint can be opened in any other layout, and by any safetensors reader:

    <role>/param-s0-00001.safetensors  exp_avg-...  exp_avg_sq-...   written by the first TP and DP rank of each pipeline stage
    <role>/index-s0.json               {kind: {tensor: [file, xxh3]}}, one for each stage
    <role>/state.json                  optimizer steps, loss scale
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlinf.errors import UserError
from rlinf.files import read_json, write_json
from rlinf.weights.tensor_folder import Stored, TensorFolder

KINDS = ("param", "exp_avg", "exp_avg_sq")


def write_index(folder: Path, stage: int, index: Mapping[str, Mapping[str, Stored]]) -> None:
    """Write down what the first rank of a stage wrote, by kind."""
    write_json(folder / f"index-s{stage}.json", index)


def open_part(folder: Path) -> dict[str, TensorFolder]:
    """The tensors of all stages, by kind. Each is compared with its checksum when it is read."""
    parts = sorted(folder.glob("index-s*.json"))
    if not parts:
        raise UserError(f"{folder}: no index-s*.json; it is not the part of a checkpoint that holds weights and moments")
    stored: dict[str, dict[str, Stored]] = {kind: {} for kind in KINDS}
    for part in parts:
        for kind, tensors in read_json(part).items():
            stored[kind].update({name: Stored(*where) for name, where in tensors.items()})
    return {kind: TensorFolder.of(folder, tensors) for kind, tensors in stored.items()}
