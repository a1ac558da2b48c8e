"""Hands out the weights of a pipeline stage to rollout engines, and computes the trainer's log-probabilities by which engines are
checked."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlinf.training.engine import MegatronEngine
from rlinf.training.packed_batch import pack_sequences
from rlinf.weights.broadcast import Wire
from rlinf.weights.buckets import BUCKET_BYTES
from rlinf.weights.device_ipc import DeviceBuckets
from rlinf.weights.files import publish_files, publisher_name
from rlinf.weights.routes import BROADCAST, DEVICE_IPC, DISK, SHARED_MEMORY
from rlinf.weights.server_groups import ServerWire
from rlinf.weights.shared_memory import SharedMemoryPublisher, collect
from rlinf.weights.source import Buckets


@dataclass(frozen=True)
class HandedOut:
    """sources: what was written or sent, by transport; empty on all ranks but the one that leads. arrays: what goes through the object
    store."""

    sources: dict[str, Buckets]
    arrays: tuple[np.ndarray, ...] = ()


class Publisher:
    """Hands out the weights of one pipeline stage.

    folder: for the transport `disk`, shared by all publishers. wire: for the transport `broadcast`.
    """

    def __init__(self, engine: MegatronEngine, run_id: str, folder: Path, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.engine, self.folder, self.bucket_bytes = engine, folder, bucket_bytes
        self.place = publisher_name(engine.at.dp_rank, engine.at.pp_rank)
        self.in_shared_memory = SharedMemoryPublisher(f"{run_id}-{self.place}")
        self.on_device = DeviceBuckets(self.in_shared_memory.name, engine.device)
        self.wire: Wire | ServerWire | None = None
        self.on_disk = False

    def hand_out(self, version: int, transports: Sequence[str]) -> HandedOut:
        """Gather this stage's weights once for each of the transports, one of which may occur twice. Collective over the TP group."""
        sources: dict[str, Buckets] = {}
        arrays: tuple[np.ndarray, ...] = ()
        for transport in transports:
            tensors = self.engine.export()
            if not self.engine.at.leads:
                for _ in tensors:  # the gather is collective
                    pass
            elif transport == SHARED_MEMORY:
                sources[transport] = self.in_shared_memory.publish(tensors, version, self.bucket_bytes)
            elif transport == DEVICE_IPC:
                sources[transport] = self.on_device.publish(tensors, version, self.bucket_bytes)
            elif transport == DISK:
                self.on_disk = True
                sources[transport] = publish_files(tensors, self.folder / self.place, version, self.bucket_bytes)
            elif transport == BROADCAST:
                assert self.wire is not None, "the group of this publisher was not made"
                sources[transport] = self.wire.send(tensors, version, self.bucket_bytes)
            else:
                sources[transport], arrays = collect(tensors, self.in_shared_memory.name, self.bucket_bytes)
        return HandedOut(sources, arrays)

    def withdraw(self, free: bool = False) -> None:
        """Remove what was handed out; it can no longer be opened. free: give its shared memory back, instead of keeping it for the next
        version."""
        self.in_shared_memory.withdraw(free)
        self.on_device.withdraw()
        if self.on_disk:
            shutil.rmtree(self.folder / self.place)
            self.on_disk = False
        if isinstance(self.wire, ServerWire):
            self.wire.forget()

    def close(self) -> None:
        self.on_device.close()
        self.wire = None  # the store where its group met may be gone
        self.withdraw()
        self.in_shared_memory.close()


def sequence_logprobs(engine: MegatronEngine, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-probability of each token given those before it, by the weights as they are handed out: [n-1] for a sequence of n tokens; empty
    on all but the last stage."""
    with engine.adapters.in_the_weights():
        outputs = engine.logprobs([pack_sequences(sequences, engine.pad_to, engine.device)])
    if not outputs:
        return []
    return [part.cpu().numpy() for part in outputs[0][0].split([len(s) - 1 for s in sequences])]
