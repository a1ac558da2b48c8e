"""Checks weights for values that are not finite."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rlinf.kernels.cpu import EXPONENT, RUN, kernels


def finite(tensor: Tensor) -> bool:
    """Whether every value is finite. Without compiled code the sum is computed first, which is fast: if it is finite, so is every value."""
    compiled = kernels()
    if compiled is not None and tensor.device.type == "cpu" and tensor.dtype in EXPONENT and tensor.is_contiguous():
        run = np.zeros(1, RUN)
        run["source"], run["nbytes"] = tensor.data_ptr(), tensor.nbytes
        run["exponent"], run["unit"] = EXPONENT[tensor.dtype]
        compiled.scan(run)
        return not run["not_finite"][0]
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
