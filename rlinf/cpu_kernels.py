"""What the CPU computes in our own C (cpu_kernels.c): products with weights as they lie in memory, and whether all values are finite.

The installation compiles it where it finds a C compiler, for each instruction set of x86-64 that it knows. `variant()` is None where that
did not happen or the CPU has none of them; callers then take what torch has.
"""

from __future__ import annotations

import ctypes
import logging
import sysconfig
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlinf.hardware import cpu_flags

log = logging.getLogger(__name__)

VARIANTS = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}, "avx2": {"avx2", "fma"}}  # best first; compiled in setup.py
LEAST_OUTPUTS = 4  # of a product
RUN = np.dtype(  # a run of bytes that is looked at, as cpu_kernels.c has it: addresses, size, number of its first word; then what was found
    [
        ("source", "u8"),
        ("to", "u8"),
        ("nbytes", "i8"),
        ("first", "u8"),
        ("sum", "u8"),
        ("exponent", "u4"),
        ("unit", "u2"),
        ("spoiled", "u2"),
    ]
)
# bits of the exponent in a 32-bit word, and the lowest of them in its upper half
EXPONENT = {torch.float32: (0x7F800000, 0x0080), torch.bfloat16: (0x7F807F80, 0x0080), torch.float16: (0x7C007C00, 0x0400)}


class Kernels:
    """One compiled variant. Raises OSError when its file is missing, or was compiled from another version of the source than lies here."""

    def __init__(self, name: str) -> None:
        path = Path(__file__).with_name(f"_cpu_kernels_{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
        self.library = library = ctypes.CDLL(str(path))
        if not made_of(library, Path(__file__).with_name("cpu_kernels.c")):
            raise OSError(f"{path} was compiled from another version of cpu_kernels.c: pip install --no-deps -e . in the checkout")
        pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
        self._linear = library.rlinf_linear
        self._linear.argtypes = (pointer, ctypes.c_int, pointer, pointer, ctypes.c_int, pointer, pointer, size, size, size)
        self._linear.restype = None
        self._look = library.rlinf_look
        self._look.argtypes = (pointer, size)
        self._look.restype = None
        # A symbol is looked for in what a library was linked with, too: this is the team of threads that torch's operations use.
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._team = ctypes.cast(torch_cpu.GOMP_parallel, pointer) if hasattr(torch_cpu, "GOMP_parallel") else None

    def linear(self, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias in fp32 [M, N], N at least 4. x, bias: fp32; weight: fp32 or bf16, computed with in fp32 as well.

        A number of the result does not depend on the number of rows or threads.
        """
        x_MK = x_MK.contiguous()
        (m, k), n = x_MK.shape, len(weight_NK)
        out_MN = torch.empty((m, n))
        bf16 = weight_NK.dtype == torch.bfloat16
        bias = None if bias_N is None else bias_N.data_ptr()
        threads = torch.get_num_threads() if self._team else 1
        self._linear(self._team, threads, x_MK.data_ptr(), weight_NK.data_ptr(), bf16, bias, out_MN.data_ptr(), m, n, k)
        return out_MN

    def look(self, runs: np.ndarray) -> None:
        """Copy the runs of bytes ([n] RUN) to where they go, if anywhere, and find their `sum` (see weights/buckets.py) and whether they
        are `spoiled` by a value that is not finite. By the calling thread alone; memory is read once."""
        self._look(runs.ctypes.data, len(runs))


def made_of(library: ctypes.CDLL, source: Path) -> bool:
    """Whether the library's number is the source's; true where there is none (an installed wheel has only the library)."""
    if not source.exists():
        return True
    return hasattr(library, "rlinf_source") and ctypes.c_uint32(library.rlinf_source()).value == zlib.crc32(source.read_bytes())


@cache
def kernels() -> Kernels | None:
    """Those for this CPU, or None, with a warning where they could have been compiled."""
    flags = cpu_flags()
    for name, needed in VARIANTS.items():
        if needed <= flags:
            try:
                return Kernels(name)
            except OSError as error:
                log.warning("products of weights as they lie are left to torch: %s", error)
                return None
    return None
