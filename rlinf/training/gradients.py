"""Megatron's data parallelism with less memory traffic, on which the step of a small model on CPU spends most of its time.

The first gradient of a parameter in a step is stored, instead of being added to zeros that were written before. A rank that is alone does
not communicate (gloo would copy all gradients and weights through fresh memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.nn import Parameter

PART = 1 << 20  # elements


def add_to(total: Tensor, gradient: Tensor) -> None:
    """total += gradient. For two precisions torch makes a copy in the wider one first: in parts, on CPU it does not leave the cache."""
    if total.dtype == gradient.dtype or total.device.type != "cpu":
        total.add_(gradient)
        return
    for into, part in zip(total.view(-1).split(PART), gradient.reshape(-1).split(PART)):
        into.add_(part)


def main_grad(param: Parameter) -> Tensor:
    """The place of its gradient in Megatron's buffer."""
    return param.main_grad  # type: ignore[attr-defined]  # Megatron gives parameters this attribute


class DataParallel(DistributedDataParallel):
    """For synchronous gradient sums over all ranks that have the same parameters, experts included.

    main_grad is undefined between zero_grad_buffer() and a parameter's first gradient.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.without_gradient: set[Parameter] = set()
        super().__init__(*args, **kwargs)
        if self.ddp_config.overlap_grad_reduce or self.expert_parallel_buffers:
            raise ValueError("DataParallel neither overlaps the sum of gradients nor knows groups of ranks for experts alone")

    def zero_grad_buffer(self) -> None:
        self.without_gradient = set(self.param_to_bucket_group)
        for group in self.bucket_groups:
            group.reset()

    def _make_backward_post_hook(self, param: Parameter) -> Callable[..., None]:
        def store(*_: Any) -> None:
            if param.grad is None:
                return
            if param in self.without_gradient:
                main_grad(param).copy_(param.grad)
                self.without_gradient.discard(param)
            else:
                add_to(main_grad(param), param.grad)
            param.grad = None

        return store

    @torch.no_grad()
    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        for param in self.without_gradient:
            main_grad(param).zero_()
        self.without_gradient = set()
        if self.dp_cp_group.size() > 1:
            super().finish_grad_sync(*args, **kwargs)

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        if self.dp_cp_group.size() > 1:
            super().start_param_sync(*args, **kwargs)
