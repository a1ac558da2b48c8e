"""What a worker's device can do."""

from __future__ import annotations

import torch

from rlinf.device import gpu_name
from rlinf.scheduling.devices import data_sheet_flops


def peak_flops(device: torch.device) -> float:
    """16-bit operations a second by the device's data sheet; 0 on CPU, and where it is not known."""
    return data_sheet_flops(gpu_name()) if device.type == "cuda" else 0.0
