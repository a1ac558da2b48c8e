"""The names of dtypes of weights, in configurations and in torch."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype, such as "bfloat16", which config.json, TensorSpec and SGLang also use."""
    return str(dtype).removeprefix("torch.")
