"""The reference policy: a second set of weights in host memory, swapped into the actor's model for a forward pass. Where adapters are
trained it is the model without them, and no second set is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlinf.training.engine import MegatronEngine


class ReferencePolicy:
    """The actor's weights as they were when this object was made: make it before anything is trained or restored."""

    @torch.no_grad()
    def __init__(self, engine: MegatronEngine) -> None:
        self.adapters = engine.adapters
        self.params = [] if self.adapters.of else [p for _, p in engine.state.params]
        self.frozen = [p.detach().to("cpu", copy=True) for p in self.params]

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Inside, the engine computes with the reference weights; outside, with the actor's, bit for bit as before."""
        current = [p.detach().to("cpu", copy=True) for p in self.params]
        self._copy_in(self.frozen)
        try:
            with self.adapters.off():
                yield
        finally:
            self._copy_in(current)

    @torch.no_grad()
    def _copy_in(self, values: list[torch.Tensor]) -> None:
        for param, value in zip(self.params, values):
            param.copy_(value)
