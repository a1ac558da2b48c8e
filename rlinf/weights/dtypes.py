"""The dtypes of weights: as a configuration names them, and as torch does."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """torch's own name, such as "bfloat16": that of config.json, of a TensorSpec and of SGLang."""
    return str(dtype).removeprefix("torch.")
