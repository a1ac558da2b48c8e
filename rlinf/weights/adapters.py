"""Low-rank adapters (LoRA, arXiv 2106.09685) of a whole model, under Hugging Face names: W x becomes W x + (alpha / rank) B A x.

W [out, in] stays as it was, A [rank, in] and B [out, rank] are trained. Which matrices have adapters: weights.mapping.adapter_rules.
"""

from __future__ import annotations

import math
import zlib
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlinf.config.schema import LoraConfig
from rlinf.errors import UserError
from rlinf.weights.architecture import Architecture
from rlinf.weights.mapping import adapter_shapes, hf_shapes
from rlinf.weights.tensor_folder import digest


class FirstAdapters(Mapping[str, Tensor]):
    """Adapters to begin with, made when they are asked for. A is uniform in ±1 / root(in), as in PEFT, from the seed and its name alone, so
    it is the same on every rank and in every layout; B is 0, so the model is at first as without adapters."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self.shapes, self.seed = shapes, seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def with_adapters(tensors: Mapping[str, Tensor], arch: Architecture, lora: LoraConfig) -> Mapping[str, Tensor]:
    """`tensors`, and the first adapters where it has none."""
    lacking = {name: shape for name, shape in adapter_shapes(arch, lora.rank, lora.target_modules).items() if name not in tensors}
    return ChainMap(FirstAdapters(lacking, lora.seed), tensors)  # type: ignore[arg-type]  # it is only read


class Noting(Mapping[str, Tensor]):
    """The same tensors; of each that was read, its checksum is in `digests`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.digests = tensors, dict[str, str]()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        self.digests[name] = digest(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def merge(matrix: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """matrix + scale · b a, computed in fp32, in the dtype of the matrix."""
    return torch.addmm(matrix.float(), b.float(), a.float(), alpha=scale).to(matrix.dtype)


def trained_shapes(arch: Architecture, lora: LoraConfig, head: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is trained, and that checkpoints hold: adapters and a `scalar` head, or all weights."""
    whole = hf_shapes(arch, head)
    if not lora.rank:
        return whole
    return adapter_shapes(arch, lora.rank, lora.target_modules) | {n: s for n, s in whole.items() if n == "score.weight"}


def what_binds(lora: LoraConfig) -> dict[str, Any] | None:
    """What must stay as it is for adapters to be trained on; None where all weights are trained."""
    return {"rank": lora.rank, "alpha": lora.alpha, "target_modules": sorted(lora.target_modules)} if lora.rank else None


def refuse_other_adapters(part: Path, state: Mapping[str, Any], lora: LoraConfig, role: str) -> None:
    """Raise UserError where a role's part of a checkpoint, whose state.json is `state`, was trained with other adapters than `lora`."""
    kept, own = state.get("lora"), what_binds(lora)
    if kept != own:
        then, now = (
            ", ".join(f"{key} {value}" for key, value in found.items()) if found else "rank 0 (no adapters)" for found in (kept, own)
        )
        raise UserError(
            f"{part}: was trained with {role}.lora of {then}, and this run has {now}; set {role}.lora as it was, or begin a new run "
            f"from {part.parent if role == 'actor' else part}/hf"
        )


def refuse_other_base(part: Path, state: Mapping[str, Any], found: Mapping[str, str], where: str) -> None:
    """Raise UserError where a model, `where`, holds other weights than those beside which the part's adapters were trained.

    found: checksums of its tensors by HF name.
    """
    for name, xxh3 in found.items():
        if state["base"].get(name) != xxh3:
            raise UserError(
                f"{part}: its adapters were trained beside other weights than those of {where}: tensor {name} differs; "
                "name the folder that the run began with"
            )


def scale_of(lora: LoraConfig) -> float:
    return lora.alpha / lora.rank
