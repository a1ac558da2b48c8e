"""What of a role leaves the device while the engine generates on it: weights and optimizer state to host memory, gradients to nowhere.

On CPU host memory is the device, so there only the gradients have an effect: their memory goes back to the system.
"""

from __future__ import annotations

from rlinf.config.schema import ActorConfig
from rlinf.device import give_back_free_memory
from rlinf.training.engine import MegatronEngine


class Offloader:
    """Does what offload_{weight,grad,optimizer} of the role's section ask for; everything else stays. Idempotent."""

    def __init__(self, engine: MegatronEngine, actor: ActorConfig) -> None:
        self.engine, self.grads = engine, actor.offload_grad
        on_gpu = engine.device.type == "cuda"
        self.weights, self.optimizer = actor.offload_weight and on_gpu, actor.offload_optimizer and on_gpu

    def after_training(self) -> None:
        """Gradients and optimizer state are not needed until the next training; the weights still are, to be published."""
        if self.grads:
            for buffer in self.engine.ddp.buffers:
                buffer.offload_to_cpu(move_params=False, move_grads=True)
        if self.optimizer:
            self.engine.optimizer.offload_to_cpu()
        self._settle()

    def after_publishing(self) -> None:
        if self.weights:
            for buffer in self.engine.ddp.buffers:
                buffer.offload_to_cpu(move_params=True, move_grads=False)
        self._settle()

    def before_forward(self) -> None:
        """Bring back what a forward pass needs."""
        for buffer in self.engine.ddp.buffers:
            buffer.reload_from_cpu(move_params=self.weights, move_grads=False)
        self._settle()

    def before_use(self) -> None:
        """Bring back everything that is away."""
        for buffer in self.engine.ddp.buffers:
            buffer.reload_from_cpu(move_params=self.weights, move_grads=self.grads)
        if self.optimizer:
            self.engine.optimizer.restore_from_cpu()
        self._settle()

    def _settle(self) -> None:
        give_back_free_memory(self.engine.device)
