"""Checks whether weights that arrived are the whole model: every tensor, with the right shape, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rlinf.weights.architecture import Architecture
from rlinf.weights.mapping import hf_shapes


def check_tensors(arch: Architecture, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by name, after every one has been checked. Raises ValueError that names the first bad one.

    The rotary buffer of old Llama checkpoints, and the output head of a model with tied embeddings, are left out.
    """
    arrived: dict[str, Tensor] = {}
    head: Tensor | None = None
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and arch.tied:
            head = tensor
            continue
        arrived[name] = tensor
    check_shapes(arch, {name: tuple(tensor.shape) for name, tensor in arrived.items()})
    if head is not None and not torch.equal(head, arrived["model.embed_tokens.weight"]):
        raise ValueError("tensor lm_head.weight differs from model.embed_tokens.weight, though config.json says tie_word_embeddings")
    return arrived


def check_shapes(arch: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError that names the first tensor which is missing, unknown or has the wrong shape."""
    expected = hf_shapes(arch)
    for name, shape in shapes.items():
        if name not in expected:
            raise ValueError(f"unexpected tensor {name}")
        if shape != expected[name]:
            raise ValueError(f"tensor {name} has shape {shape}, expected {expected[name]}")
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise ValueError(f"missing tensor {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
