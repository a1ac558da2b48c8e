"""Proves that a weight sync worked: the engines have the bytes that were sent, and on fixed probe prompts their log-probabilities are the
trainer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from rlinf.errors import RunFailed
from rlinf.weights.source import Buckets, Receipt

# Largest |log-probability difference| on the probes that still counts as the same policy. fp32 differs by rounding only; in 16 bits the
# kernels of trainer and engine round differently, by up to 0.2 on the models that were tried; a wrong tensor causes several units.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1}

Source = TypeVar("Source", bound=Buckets)


def merge_sources(parts: Sequence[Source]) -> Source:
    """The sources that the pipeline stages published, all for the same transport, as one."""
    return replace(parts[0], buckets=tuple(b for part in parts for b in part.buckets))  # type: ignore[misc]  # each of its own kind


def check_receipts(sources: Sequence[Buckets], version: int, receipts: Sequence[Receipt]) -> None:
    """Raise RunFailed when an engine loaded another version, other tensors or other bytes than it was sent. Both arguments: by engine."""
    for rank, (source, receipt) in enumerate(zip(sources, receipts, strict=True)):
        tensors = sum(len(b.tensors) for b in source.buckets)
        if receipt.version != version or receipt.n_tensors != tensors:
            raise RunFailed(
                f"weight sync {version}: rollout rank {rank} reports version {receipt.version} and {receipt.n_tensors} tensors; "
                f"{tensors} were sent"
            )
        wrong = next((b for b in source.buckets if receipt.checksums.get(b.key) != b.checksum), None)
        if wrong:
            raise RunFailed(
                f"weight sync {version}: rollout rank {rank} received other bytes than were sent in bucket {wrong.key} (tensors "
                f"{wrong.tensors[0].name} to {wrong.tensors[-1].name})"
            )
        if (name := first_difference(receipts[0].engine_tensors, receipt.engine_tensors)) is not None:
            raise RunFailed(
                f"weight sync {version}: rollout ranks 0 and {rank} hold different weights by their engines' own checksums, first in {name}"
            )


def first_difference(a: Mapping[str, str], b: Mapping[str, str]) -> str | None:
    """The first tensor whose checksums differ, or that one side lacks."""
    return None if a == b else next(name for name in {**a, **b} if a.get(name) != b.get(name))


def check_probes(version: int, precision: str, trainer: Sequence[np.ndarray], engines: Sequence[Sequence[np.ndarray]]) -> float:
    """The largest gap over all probes and engines. Raises RunFailed when one exceeds the tolerance of the precision."""
    largest = 0.0
    for rank, engine in enumerate(engines):
        for i, (expected, got) in enumerate(zip(trainer, engine, strict=True)):
            if expected.shape != got.shape:
                raise RunFailed(
                    f"weight sync {version}: probe {i} has {len(expected)} scores of the actor, {len(got)} of rollout rank {rank}"
                )
            gap = float(np.abs(expected - got).max())
            if not gap <= TOLERANCE[precision]:
                raise RunFailed(
                    f"weight sync {version}: on probe {i} rollout rank {rank} differs from the actor by {gap:.3g} in log-probability "
                    f"(tolerance {TOLERANCE[precision]:g}): the engine does not run the actor's weights"
                )
            largest = max(largest, gap)
    return largest
