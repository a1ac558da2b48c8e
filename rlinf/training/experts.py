"""A layer's mixture of experts as a Megatron module. The experts are divided among the tensor-parallel ranks, each of which has whole ones
and computes for the tokens that go to them; the sum over the ranks is the one that a row-parallel matrix needs, too. Beside it they
exchange the router's logits or their gradient; there are no groups of ranks for experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module, Parameter

from rlinf.kernels.experts import mixture, products, route, router_logits
from rlinf.weights.architecture import Architecture


class ExpertsMLP(Module):
    """Takes the place of Megatron's MLP. Every rank routes all tokens, the same way.

    router [E, H]; of this rank's experts gate_up [experts, 2F, H] and down [experts, H, F]. load_E: how often each expert was chosen for
    the rows that count_load() named.
    """

    arch: Architecture  # given to a subclass
    load_E: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        arch, self.sequence_parallel = self.arch, config.sequence_parallel
        tp, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        self.here = range(rank * arch.experts // tp, (rank + 1) * arch.experts // tp)

        def weight(*shape: int) -> Parameter:
            return Parameter(torch.empty(*shape, dtype=config.params_dtype))

        self.router = weight(arch.experts, arch.hidden)
        self.gate_up = weight(len(self.here), 2 * arch.ffn, arch.hidden)
        self.down = weight(len(self.here), arch.hidden, arch.ffn)
        self.register_buffer("load_E", torch.zeros(arch.experts, dtype=torch.int64), persistent=False)
        self.counted_rows: Tensor | None = None
        # each rank routes its share of the rows, and Megatron sums such gradients over the tensor-parallel ranks
        setattr(self.router, "sequence_parallel", self.sequence_parallel)

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[rows, 1, H] of this rank -> the same, and no bias.

        What a rank knows of the gradients of x and of the logits is the part of its own experts: both ways into the region of tensor
        parallelism sum it over the ranks on the way back.
        """
        x = hidden.squeeze(1)
        logits = router_logits(x, self.router)
        enter = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        leave = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else reduce_from_tensor_model_parallel_region
        weights_TK, experts_TK = route(enter(logits), self.arch.top_k, self.arch.normalized_routing)
        if self.counted_rows is not None:
            chosen = experts_TK[self.counted_rows].flatten()
            self.load_E.index_add_(0, chosen, torch.ones_like(chosen))
        made = mixture(enter(x), weights_TK, experts_TK, products(self.gate_up), products(self.down), self.here, self.arch.experts)
        return leave(made)[:, None], None


@contextmanager
def count_load(layers: Sequence[ExpertsMLP], rows: Tensor) -> Iterator[None]:
    """Inside, the experts of `rows` are counted in load_E: in a forward pass, but not where activations are computed again. The rows that
    predict response tokens are the same however samples are packed; prompts that are shared, and padding, are not."""
    for layer in layers:
        layer.counted_rows = rows
    try:
        yield
    finally:
        for layer in layers:
            layer.counted_rows = None


def load_metrics(load_LE: Tensor) -> dict[str, float]:
    """Of the counts of all layers: the share of the most used expert in its layer's, times the number of experts, of the layer where it is
    largest; and the share of experts that were not used. NaN where no token was counted."""
    share_LE = load_LE.double() / load_LE.sum(-1, keepdim=True)
    unused = (share_LE == 0).double().mean() if load_LE.any() else math.nan
    return {"train/expert_load_max": float(share_LE.max() * load_LE.shape[1]), "train/experts_unused": float(unused)}
