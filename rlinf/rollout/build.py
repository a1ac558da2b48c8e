"""From the configuration to a rollout engine."""

from __future__ import annotations

from typing import Protocol

import torch

from rlinf.config.schema import Config
from rlinf.errors import UserError
from rlinf.rollout.contract import RolloutEngine
from rlinf.rollout.embedded_engine import EmbeddedEngine


class Tokenizer(Protocol):
    """What an engine needs of a tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


def build_engine(config: Config, tokenizer: Tokenizer, device: str) -> RolloutEngine:
    """The engine of rollout.rollout_backend with the weights of rollout.model_dir (version 0) on `device`."""
    rollout = config.rollout
    if rollout.rollout_backend != "embedded":
        raise UserError(f"rollout.rollout_backend: the {rollout.rollout_backend} engine is not part of this version; use `embedded`")
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(rollout.gpu_memory_utilization)  # beyond its share the engine fails, not its neighbour
    return EmbeddedEngine(
        rollout.model_dir,
        dtype=rollout.precision or config.actor.model.precision,
        slots=rollout.max_running_requests,
        max_context=config.runner.seq_length,
        seed=rollout.seed,
        device=device,
        decode=tokenizer.decode,
    )
