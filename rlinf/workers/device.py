"""What a worker's device can do, and how much memory has been taken of it."""

from __future__ import annotations

import resource

import torch

from rlinf.scheduling.devices import data_sheet_flops


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float:
    """16-bit operations a second by the device's data sheet; 0 on CPU, and where it is not known."""
    return data_sheet_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0
