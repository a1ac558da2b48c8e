"""What a worker's process has taken at most."""

from __future__ import annotations

import resource

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
