"""Which memory of a role leaves the device while an engine generates on it (actor.offload_*).

Weights and optimizer state are moved to pinned host memory; gradients are freed. On CPU, host memory is the device, so only freeing the
gradients has an effect there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlinf.config.schema import ActorConfig
from rlinf.device import give_back_free_memory, host_copy
from rlinf.training.engine import MegatronEngine


class Offloader:
    """Does what offload_{weight,grad,optimizer} of the role's section ask for. Every method may be called again without effect."""

    def __init__(self, engine: MegatronEngine, actor: ActorConfig) -> None:
        self.engine, self.grads = engine, actor.offload_grad
        on_gpu = engine.device.type == "cuda"
        self.weights, self.optimizer = actor.offload_weight and on_gpu, actor.offload_optimizer and on_gpu
        self.parked, self.parked_weights = Parked(), Parked()

    def after_training(self) -> None:
        """Free gradients and optimizer state, which are not needed until the next training. The weights still are: they will be
        published."""
        if self.grads:
            for buffer in self.engine.ddp.buffers:
                buffer.offload_to_cpu(move_params=False, move_grads=True)
        if self.optimizer:
            self.parked.park(optimizer_tensors(self.engine))
        give_back_free_memory(self.engine.device)

    def after_publishing(self) -> None:
        """Free the weights."""
        if self.weights:
            for buffer in self.engine.ddp.buffers:
                buffer.offload_to_cpu(move_params=True, move_grads=False)
            self.parked_weights.park(untrained_weights(self.engine))
        give_back_free_memory(self.engine.device)

    def before_forward(self) -> None:
        """Bring back what a forward pass needs."""
        for buffer in self.engine.ddp.buffers:
            buffer.reload_from_cpu(move_params=self.weights, move_grads=False)
        self.parked_weights.bring_back()
        give_back_free_memory(self.engine.device)

    def before_use(self) -> None:
        """Bring back everything that is away."""
        for buffer in self.engine.ddp.buffers:
            buffer.reload_from_cpu(move_params=self.weights, move_grads=self.grads)
        self.parked_weights.bring_back()
        self.parked.bring_back()
        give_back_free_memory(self.engine.device)


class Parked:
    """Tensors whose device memory is freed and later restored, bit for bit. They stay the same tensor objects.

    The host memory is kept for the next time.
    """

    def __init__(self) -> None:
        self._host: dict[Tensor, Tensor] = {}  # by identity: tensors hash by it

    @torch.no_grad()
    def park(self, tensors: Iterator[Tensor]) -> None:
        """Free the memory of these tensors, each of which must be the only one with its storage. A tensor that is already parked is left
        alone."""
        for tensor in tensors:
            if tensor.untyped_storage().size() > 0:
                self._host[tensor] = host_copy(tensor, into=self._host.get(tensor))
                tensor.untyped_storage().resize_(0)

    @torch.no_grad()
    def bring_back(self) -> None:
        for tensor, host in self._host.items():
            if tensor.untyped_storage().size() == 0:
                tensor.untyped_storage().resize_(tensor.nbytes)
                tensor.copy_(host, non_blocking=True)


def untrained_weights(engine: MegatronEngine) -> Iterator[Tensor]:
    """Those beside which adapters are trained: they are in none of Megatron's buffers."""
    return (param for _, param in engine.state.params if not param.requires_grad)


def optimizer_tensors(engine: MegatronEngine) -> Iterator[Tensor]:
    """Adam's moments, and the master weights where they are not the model's own (as they are in fp32)."""
    own = {buffer.param_data.untyped_storage().data_ptr() for buffer in engine.ddp.buffers if buffer.param_data is not None}
    for group in engine.distributed.optimizer.param_groups:
        for param in group["params"]:
            if param.data.untyped_storage().data_ptr() not in own:
                yield param
            state = engine.distributed.optimizer.state[param]
            yield from (state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)
