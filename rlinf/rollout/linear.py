"""The matrix products of the embedded engine: x @ weight.T + bias, each in the form that is fastest where it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.hardware import cpu_multiplies_bf16
from rlinf.kernels.cpu import LEAST_OUTPUTS, Kernels, kernels
from rlinf.kernels.experts import Grouped, one_by_one, products

Linear = Callable[[Tensor], Tensor]  # [N, in] -> [N, out]

LEAST_ROWS = 4  # of a forward pass: with fewer, torch's products on CPU take another path, and round differently
MOST_ROWS = 128  # with more, reordering weights at every call costs less than it gains


def uses_weight_in_place(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` computes directly with the memory of the weight that it is given, without a copy in another form.

    It does on GPUs, and on a CPU where our own code knows the CPU's best instructions for the type. Elsewhere oneDNN knows them, and makes
    one reordered copy of the weight. benchmarks/rollout_engine.py and benchmarks/weight_sync.py say what both cost.
    """
    if device.type != "cpu":
        return True
    if (compiled := kernels()) is None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and (compiled.multiplies_bf16 or not cpu_multiplies_bf16()))


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """x -> x @ weight.T + bias. Where uses_weight_in_place(), nobody may write to the weight's memory as long as this is used."""
    if weight.device.type != "cpu":
        return partial(F.linear, weight=weight, bias=bias)
    if (compiled := kernels()) is not None and uses_weight_in_place(weight.dtype, weight.device) and len(weight) >= LEAST_OUTPUTS:
        return InPlaceLinear(compiled, weight, bias)
    return _reordered(weight, bias)


def grouped(weights: Sequence[Tensor]) -> Grouped:
    """The products of experts: each row with the matrix of its own. On a GPU the matrices are put into one."""
    if weights[0].device.type != "cpu":
        return products(torch.stack(list(weights)))
    return one_by_one([linear(weight, None) for weight in weights])


def head(weight: Tensor) -> Linear:
    """Logits in fp32, accumulated in fp32 also for 16-bit weights: rounded to bf16 they would be off by 0.06 nats at a logit of 20."""
    if weight.device.type == "cuda" and weight.dtype != torch.float32:
        return lambda x: torch.mm(x, weight.t(), out_dtype=torch.float32)
    if weight.device.type == "cuda":
        return partial(F.linear, weight=weight)
    if (compiled := kernels()) is not None and weight.dtype in (torch.float32, torch.bfloat16) and len(weight) >= LEAST_OUTPUTS:
        return InPlaceLinear(compiled, weight, None, torch.float32)
    product = _reordered(weight.float(), None)
    return lambda x: product(F.pad(x.float(), (0, 0, 0, max(0, LEAST_ROWS - len(x)))))[: len(x)]


class InPlaceLinear:
    """A product of our own (rlinf/kernels/c), accumulated in fp32; of many rows torch's, where that is faster.

    dtype: of the result, by default the weight's.
    """

    def __init__(self, compiled: Kernels, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        self._kernels, self._weight, self._bias = compiled, weight, bias
        self._bias_fp32 = None if bias is None else bias.float()
        self._dtype = dtype or weight.dtype
        torch_is_faster = weight.dtype == torch.float32 or compiled.multiplies_bf16
        torch_has_it = self._dtype == weight.dtype  # and no fp32 result of bf16 numbers
        self._most_rows = MOST_ROWS if torch_is_faster and torch_has_it else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._most_rows is not None and len(x) > self._most_rows:
            return F.linear(x, self._weight, self._bias)
        return self._kernels.linear(x, self._weight, self._bias_fp32, self._dtype)


def _reordered(weight: Tensor, bias: Tensor | None) -> Linear:
    """Once for oneDNN instead of at every call, where it has instructions for the type."""
    onednn = torch.ops.mkldnn
    instructions = {torch.bfloat16: onednn._is_mkldnn_bf16_supported, torch.float16: onednn._is_mkldnn_fp16_supported}
    if not torch.backends.mkldnn.is_available() or not instructions.get(weight.dtype, lambda: True)():
        return partial(F.linear, weight=weight.clone(), bias=bias)
    packed = onednn._reorder_linear_weight(weight.contiguous())
    return lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], "")
