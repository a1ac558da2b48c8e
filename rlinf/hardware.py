"""What this machine has, as its files say it: asks no library, starts nothing."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

GPUS = "CUDA_VISIBLE_DEVICES"  # the variable that says which GPUs a process sees; CUDA reads it once
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # x86's and ARM's words for instructions that multiply bf16 numbers


def has_gpu() -> bool:
    """Whether this machine has a CUDA device that this process may see."""
    hidden = os.environ.get(GPUS) in ("", "-1")
    return not hidden and Path("/dev/nvidiactl").exists() and any(Path("/dev").glob("nvidia[0-9]*"))


@cache  # each matrix of a weight sync asks
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Names of the CPU's instruction sets as Linux has them; empty elsewhere."""
    if not cpuinfo.exists():
        return frozenset()
    lines = cpuinfo.read_text().splitlines()
    return frozenset(flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split())


def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for products of bf16 numbers. One without takes three times as long for them as for fp32."""
    return not BF16_FLAGS.isdisjoint(cpu_flags(cpuinfo))


def fast_precision(device: str) -> str:
    """`bf16` where products of it are fast, else `fp32`. device: `cuda`, `cpu` or `auto` (cuda where this machine has a GPU)."""
    cuda = has_gpu() if device == "auto" else device == "cuda"
    return "bf16" if cuda or cpu_multiplies_bf16() else "fp32"
