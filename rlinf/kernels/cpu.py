"""What the CPU computes in C of our own (rlinf/kernels/c): products with weights as they lie in memory, the attention of a decode step,
rows, the head, a scan of weights on their way.

The installation compiles it where it finds a C compiler, for each instruction set of x86-64 that it knows. `kernels()` is None where that
did not happen or the CPU has none of them; callers then take what torch has.
"""

from __future__ import annotations

import ctypes
import logging
import sysconfig
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlinf.hardware import cpu_flags

log = logging.getLogger(__name__)

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}
VARIANTS = {  # best first, with the instructions that they need; compiled in setup.py
    "amx": AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512bf16": AVX512 | {"avx512_bf16"},
    "avx512": AVX512,
    "avx2": {"avx2", "fma"},
}
LEAST_OUTPUTS = 4  # of a product
FP32, BF16_WEIGHT, BF16_PAIRS = 0, 1, 2  # kinds of products, as products.c has them
LEAST_LANES = 16  # of a row that is computed with by whole vectors
TILE = 16  # rows of the weight at least for a product by tiles
PART = 16  # rows: a gradient that is summed over rows is summed over each part first
ARGUMENTS = {"p": ctypes.c_void_p, "i": ctypes.c_int, "n": ctypes.c_ssize_t, "f": ctypes.c_float}
FUNCTIONS = {  # after rlinf_: their arguments, the first two of which are a team of threads and how many of them
    "linear": "pi ipppp innn",
    "linear_amx": "pi pppp ip nnn",
    "decode_attention": "pi ppppppp p fi",
    "norm": "pi pppp nnn fi",
    "norm_back": "pi pppppp nnnn i",
    "silu": "pi ppp nnn i",
    "silu_back": "pi ppppp nnnnn i",
    "rotate": "pi pppp nnnnn fi",
    "softmax": "pi p nnn fi",
    "softmax_back": "pi pp nnn fi",
    "head_top": "pi pp nnn i",
    "head_sums": "pi pppp nnn fi",
    "head_back": "pi ppppppp nnn fi",
    "scan": "p n",
}
ONLY_AMX = {"linear_amx"}
SOURCES = Path(__file__).with_name("c")
ATTENTION_LANES, ATTENTION_DIM = 32, 256  # the head dimension of decode attention: a multiple, and at most
RUN = np.dtype(  # a run of bytes that is scanned, as bytes.c has it: addresses, size, number of its first word; then what was found
    [
        ("source", "u8"),
        ("to", "u8"),
        ("nbytes", "i8"),
        ("first", "u8"),
        ("sum", "u8"),
        ("exponent", "u4"),
        ("unit", "u2"),
        ("not_finite", "u2"),
    ]
)
# bits of the exponent in a 32-bit word, and the lowest of them in its upper half
EXPONENT = {torch.float32: (0x7F800000, 0x0080), torch.bfloat16: (0x7F807F80, 0x0080), torch.float16: (0x7C007C00, 0x0400)}


class Kernels:
    """One compiled variant.

    multiplies_bf16: it has products of bf16 numbers without a way through fp32; tiles: whole tiles of them.
    Raises OSError when it was compiled from another version of the source than lies here, FileNotFoundError when it was not compiled,
    PermissionError when the kernel lets no process use its instructions.
    """

    _linear: Callable[..., None]
    _linear_amx: Callable[..., None]
    _decode_attention: Callable[..., None]
    _norm: Callable[..., None]
    _norm_back: Callable[..., None]
    _silu: Callable[..., None]
    _silu_back: Callable[..., None]
    _rotate: Callable[..., None]
    _softmax: Callable[..., None]
    _softmax_back: Callable[..., None]
    _head_top: Callable[..., None]
    _head_sums: Callable[..., None]
    _head_back: Callable[..., None]
    _scan: Callable[..., None]

    def __init__(self, name: str) -> None:
        self.name = name
        path = Path(__file__).with_name(f"_cpu_{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: there was no C compiler that knows {name} when rlinf was installed")
        self.library = library = ctypes.CDLL(str(path))
        if not made_of(library, SOURCES):
            raise OSError(f"{path} was compiled from another version of {SOURCES}: pip install --no-deps -e . in the checkout")
        for function, arguments in FUNCTIONS.items():
            if name == "amx" or function not in ONLY_AMX:
                bound = getattr(library, f"rlinf_{function}")
                bound.argtypes, bound.restype = tuple(ARGUMENTS[letter] for letter in arguments.replace(" ", "")), None
                setattr(self, f"_{function}", bound)
        self.multiplies_bf16, self.tiles = bool(library.rlinf_multiplies_pairs()), name == "amx"
        if self.tiles and not library.rlinf_may_use_tiles():
            raise PermissionError(f"{path}: the kernel does not let this process use AMX")
        # A symbol is looked for in what a library was linked with, too: this is the team of threads that torch's operations use.
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._team = ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p) if hasattr(torch_cpu, "GOMP_parallel") else None

    def linear(self, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """x @ weight.T + bias, summed in fp32, as `dtype` [M, N], N at least 4. x, weight: fp32 or bf16; bias: fp32.

        A number of the result does not depend on the number of rows or threads.
        """
        (m, k), n = x_MK.shape, len(weight_NK)
        bf16 = _is_bf16(weight_NK)
        pairs = bf16 and _is_bf16(x_MK) and self.multiplies_bf16
        x_MK = (x_MK if pairs else x_MK.float()).contiguous()
        rounded = pairs and dtype == torch.bfloat16
        out_MN = torch.empty((m, n), dtype=torch.bfloat16 if rounded else torch.float32)
        addresses = _addresses(x_MK, weight_NK, bias_N, out_MN)
        if pairs and self.tiles and n >= TILE:
            room = torch.empty(_up(m) * _up(k), dtype=torch.bfloat16)
            self._linear_amx(*self._threads(), *addresses, rounded, room.data_ptr(), m, n, k)
        else:
            kind = BF16_PAIRS if pairs else BF16_WEIGHT if bf16 else FP32
            self._linear(*self._threads(), kind, *addresses, rounded, m, n, k)
        return out_MN.to(dtype)

    def decode_attention(
        self, queries_RAD: Tensor, keys_RKD: Tensor, values_RKD: Tensor, caches_2RKCD: Tensor, positions_R: Tensor, scale: float
    ) -> Tensor:
        """Write the new keys and values to their positions in the caches, then attend to all up to there: [R, A, D], softmax in fp32.

        All of one type, fp32 or bf16; D as ATTENTION_LANES and ATTENTION_DIM say; positions int64. It is about the caches' first R slots.
        """
        out_RAD = torch.empty(queries_RAD.shape, dtype=queries_RAD.dtype)
        rows, heads, dim = keys_RKD.shape
        group, capacity = queries_RAD.shape[1] // heads, caches_2RKCD.shape[3]
        tensors = queries_RAD, keys_RKD, values_RKD, caches_2RKCD[0], caches_2RKCD[1], positions_R, out_RAD
        sizes = (ctypes.c_ssize_t * 8)(rows, heads, group, dim, capacity, *(t.stride(0) for t in tensors[:3]))
        self._decode_attention(*self._threads(), *_addresses(*tensors), sizes, scale, _is_bf16(queries_RAD))
        return out_RAD

    def norm(self, x_NH: Tensor, weight_H: Tensor, eps: float, scale_N: Tensor | None = None) -> Tensor:
        """x / root(mean(x^2) + eps) * weight [N, H]; x and weight of one type, fp32 or bf16. scale (fp32) gets 1 / root, for norm_back."""
        (n, width), out_NH = x_NH.shape, torch.empty(x_NH.shape, dtype=x_NH.dtype)
        self._norm(*self._threads(), *_addresses(x_NH, weight_H, out_NH, scale_N), n, width, x_NH.stride(0), eps, _is_bf16(x_NH))
        return out_NH

    def norm_back(self, x_NH: Tensor, weight_H: Tensor, scale_N: Tensor, grad_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        (n, width), out_NH = x_NH.shape, torch.empty(x_NH.shape, dtype=x_NH.dtype)
        sums_PH = torch.empty(-(-n // PART), width)
        addresses = _addresses(x_NH, weight_H, grad_NH, scale_N, out_NH, sums_PH)
        self._norm_back(*self._threads(), *addresses, n, width, x_NH.stride(0), grad_NH.stride(0), _is_bf16(x_NH))
        return out_NH, sums_PH.sum(0).to(weight_H.dtype)

    def silu(self, gate_up_N2F: Tensor) -> Tensor:
        """silu(gate) * up [N, F], gate and up side by side, F at least LANES; fp32 or bf16."""
        n, width = len(gate_up_N2F), gate_up_N2F.shape[1] // 2
        out_NF = torch.empty(n, width, dtype=gate_up_N2F.dtype)
        addresses = _addresses(gate_up_N2F, gate_up_N2F[:, width:], out_NF)
        self._silu(*self._threads(), *addresses, n, width, gate_up_N2F.stride(0), _is_bf16(out_NF))
        return out_NF

    def silu_back(self, gate_up_N2F: Tensor, grad_NF: Tensor) -> Tensor:
        """Gradient of gate and up, side by side."""
        (n, width), out_N2F = grad_NF.shape, torch.empty(gate_up_N2F.shape, dtype=gate_up_N2F.dtype)
        addresses = _addresses(gate_up_N2F, gate_up_N2F[:, width:], grad_NF, out_N2F, out_N2F[:, width:])
        strides = gate_up_N2F.stride(0), grad_NF.stride(0), 2 * width
        self._silu_back(*self._threads(), *addresses, n, width, *strides, _is_bf16(grad_NF))
        return out_N2F

    def rotate(self, x_NAD: Tensor, cos_ND: Tensor, sin_ND: Tensor, back: bool = False) -> Tensor:
        """Rotary embedding of halves (Hugging Face's rotate_half), D at least 2 * LANES; back: the other way round, its gradient.

        Read are the first half of cos and the second of sin. All of one type, fp32 or bf16; a row's heads lie side by side.
        """
        (n, heads, dim), out_NAD = x_NAD.shape, torch.empty(x_NAD.shape, dtype=x_NAD.dtype)
        addresses = _addresses(x_NAD, cos_ND, sin_ND[:, dim // 2 :], out_NAD)
        sizes = n, heads, dim // 2, x_NAD.stride(0), cos_ND.stride(0)
        self._rotate(*self._threads(), *addresses, *sizes, -1.0 if back else 1.0, _is_bf16(x_NAD))
        return out_NAD

    def softmax(self, scores_NLS: Tensor, length: int, scale: float) -> None:
        """Scores become softmax(scale * scores) of causal attention: row i sees S - length + 1 + i % length keys, the others get 0."""
        n, rows, size = scores_NLS.shape
        self._softmax(*self._threads(), scores_NLS.data_ptr(), n * rows // length, length, size, scale, _is_bf16(scores_NLS))

    def softmax_back(self, weights_NLS: Tensor, grad_NLS: Tensor, length: int, scale: float) -> None:
        """The gradient of the weights becomes that of the scores."""
        n, rows, size = grad_NLS.shape
        sizes = n * rows // length, length, size
        self._softmax_back(*self._threads(), *_addresses(weights_NLS, grad_NLS), *sizes, scale, _is_bf16(grad_NLS))

    def head_top(self, logits_NV: Tensor, valid: int) -> Tensor:
        """The largest of the first `valid` logits of each row [N], fp32; NaN if one of them is."""
        top_N = torch.empty(len(logits_NV))
        self._head_top(*self._threads(), *_addresses(logits_NV, top_N), *logits_NV.shape, valid, _is_bf16(logits_NV))
        return top_N

    def head_sums(self, logits_NV: Tensor, columns_N: Tensor, top_N: Tensor, temperature: float, valid: int) -> Tensor:
        """[3, N] fp32 of z = (logit - top) / temperature over the first `valid`: sum of e^z, z of the column, sum of z e^z."""
        sums_3N = torch.empty(3, len(logits_NV))
        addresses = _addresses(logits_NV, columns_N, top_N, sums_3N)
        self._head_sums(*self._threads(), *addresses, *logits_NV.shape, valid, 1 / temperature, _is_bf16(logits_NV))
        return sums_3N

    def head_back(
        self,
        logits_NV: Tensor,
        columns_N: Tensor,
        mine_N: Tensor,
        lse_N: Tensor,
        entropy_N: Tensor,
        by_logprob_N: Tensor,
        by_entropy_N: Tensor | None,
        temperature: float,
        valid: int,
    ) -> None:
        """The logits become their gradient: by_logprob of the column's log-probability where it is `mine`, by_entropy of the entropy.

        Both have been divided by the temperature. lse: log of the sum of e^(logit / temperature). Padding gets 0.
        """
        by_logprob_N, by_entropy_N = by_logprob_N.contiguous(), None if by_entropy_N is None else by_entropy_N.contiguous()
        addresses = _addresses(logits_NV, columns_N, mine_N, lse_N, entropy_N, by_logprob_N, by_entropy_N)
        self._head_back(*self._threads(), *addresses, *logits_NV.shape, valid, 1 / temperature, _is_bf16(logits_NV))

    def scan(self, runs: np.ndarray) -> None:
        """Copy the runs of bytes ([n] RUN) to where they go, if anywhere, and find their `sum` (see weights/scan.py) and whether one
        of their values is `not_finite`. By the calling thread alone; memory is read once."""
        self._scan(runs.ctypes.data, len(runs))

    def _threads(self) -> tuple[ctypes.c_void_p | None, int]:
        return self._team, torch.get_num_threads() if self._team else 1


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _up(n: int) -> int:
    """To pairs of tiles."""
    return -(-n // (2 * TILE)) * 2 * TILE


def made_of(library: ctypes.CDLL, sources: Path) -> bool:
    """Whether the library's number is that of the folder's files; true where it is not there (an installed wheel has only the library)."""
    if not sources.exists():
        return True
    number = zlib.crc32(b"".join(source.read_bytes() for source in sorted(sources.glob("*.[ch]"))))
    return hasattr(library, "rlinf_source") and ctypes.c_uint32(library.rlinf_source()).value == number


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """Those that compute with such tensors, if any do."""
    return kernels() if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) else None


@cache
def kernels() -> Kernels | None:
    """Those for this CPU, or None, with a warning where they could have been compiled."""
    failures = []
    for name in [name for name, needed in VARIANTS.items() if needed <= cpu_flags()]:
        try:
            return Kernels(name)
        except (PermissionError, FileNotFoundError) as error:  # the next best is to be had
            failures.append(str(error))
        except OSError as error:
            failures.append(str(error))
            break
    if failures:
        log.warning("what rlinf/kernels/c computes is left to torch: %s", "; ".join(failures))
    return None
