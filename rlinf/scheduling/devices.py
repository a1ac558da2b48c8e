"""Speeds and sizes of devices, with which `rlinf plan` computes: numbers from the vendors' data sheets. Which share of them practice
reaches is in step_time."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rlinf.hardware import cores

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device as a process sees it.

    memory, context: bytes. context is what driver, libraries and process groups take in every process besides tensors.
    flops: 16-bit dense operations per second. bandwidth: bytes per second of its memory.
    link, network, host: bytes per second in one direction to a device of the same node, to another node, and to host memory.
    shared: the devices of a node share one memory.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    host: float
    context: int
    shared: bool = False


def _gpu(name: str, gib: float, tera: float, bandwidth: float, link: float, network: float, host: float) -> Device:
    return Device(name, int(gib * GIB), tera * 1e12, bandwidth * 1e9, link * 1e9, network * 1e9, host * 1e9, 3 * GIB // 2)


GPUS = {
    d.name: d
    for d in (  # name, GiB, TFLOP/s, GB/s: memory, NVLink or PCIe, network (400 Gb/s a GPU; 100 Gb/s on PCIe cards), host
        _gpu("h100", 79.6, 989, 3350, 450, 50, 25),
        _gpu("h200", 140.4, 989, 4800, 450, 50, 25),
        _gpu("h800", 79.6, 989, 3350, 200, 50, 25),
        _gpu("h20", 95.6, 148, 4000, 450, 50, 25),
        _gpu("a100", 79.6, 312, 2039, 300, 25, 20),
        _gpu("a100-40g", 39.5, 312, 1555, 300, 25, 20),
        _gpu("l40s", 44.5, 362, 864, 25, 12.5, 20),
        _gpu("rtx4090", 23.5, 165, 1008, 25, 12.5, 20),
    )
}


def data_sheet_flops(name: str) -> float:
    """16-bit operations per second of a device that the driver calls `name` (NVIDIA H100 80GB HBM3); 0 when it is not in the table."""
    plain = name.lower().replace(" ", "")
    known = [key for key in GPUS if key.partition("-")[0] in plain]
    return GPUS[max(known, key=len)].flops if known else 0.0


def cpu_device(slots: int) -> Device:
    """A process slot of this machine.

    110 GFLOP/s (16 bit; half of it in fp32) and 10 GB/s are what a core with AVX-512 reaches in training.
    """
    own = max(1, cores() // slots)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("cpu", memory, own * 2.75e11, own * 1.6e10, 5e9, 1e9, 5e9, 3 * GIB // 5, shared=True)
