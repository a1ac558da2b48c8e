"""A stage's weights on their way to the rollout engines, and the trainer's side of the proof that they arrived."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlinf.training.engine import MegatronEngine
from rlinf.training.layout import pack_sequences
from rlinf.weights.buckets import BUCKET_BYTES
from rlinf.weights.routes import SHARED_MEMORY
from rlinf.weights.shared_memory import Segments, collect
from rlinf.weights.source import SharedMemory


def segments_of(engine: MegatronEngine, run_id: str) -> Segments:
    """Where this rank publishes."""
    return Segments(f"{run_id}-d{engine.at.dp_rank}-s{engine.at.pp_rank}")


def hand_out(
    engine: MegatronEngine, segments: Segments, version: int, transports: Sequence[str], bucket_bytes: int = BUCKET_BYTES
) -> tuple[dict[str, SharedMemory], tuple[np.ndarray, ...]]:
    """Gather this stage's weights once for each transport: what was written, by transport (on the first TP rank), and the arrays that
    the object store carries. Collective over the TP group."""
    sources: dict[str, SharedMemory] = {}
    arrays: tuple[np.ndarray, ...] = ()
    for transport in transports:
        tensors = engine.export()
        if engine.at.tp_rank > 0:
            for _ in tensors:  # the gather is collective
                pass
        elif transport == SHARED_MEMORY:
            sources[transport] = segments.publish(tensors, version, bucket_bytes)
        else:
            sources[transport], arrays = collect(tensors, segments.name, bucket_bytes)
    return sources, arrays


def score(engine: MegatronEngine, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
    """Log-probability of each token given those before it: [n-1] for a sequence of n tokens; empty on all but the last stage."""
    outputs = engine.logprobs([pack_sequences(sequences, temperature or 1.0, engine.pad_to, engine.device)])
    if not outputs:
        return []
    return [part.cpu().numpy() for part in outputs[0][0].split([len(s) - 1 for s in sequences])]
