"""The peak speed of a worker's device."""

from __future__ import annotations

import torch

from rlinf.device import gpu_name
from rlinf.scheduling.devices import data_sheet_flops


def peak_flops(device: torch.device) -> float:
    """16-bit operations per second in the data sheet of the device; 0 on CPU, and for a GPU that is not in the table."""
    return data_sheet_flops(gpu_name()) if device.type == "cuda" else 0.0
