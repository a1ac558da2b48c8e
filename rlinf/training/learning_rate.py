"""The learning rate as a function of the optimizer step."""

from __future__ import annotations

import math

from rlinf.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Rate of optimizer step `step`, counted from 1: linear warm-up from 0, then constant, linear or cosine decay to min_lr."""
    if step <= optim.lr_warmup_steps:
        return optim.lr * step / optim.lr_warmup_steps
    if optim.lr_decay_style == "constant":
        return optim.lr
    span = max(1, optim.lr_decay_steps - optim.lr_warmup_steps)
    done = min(1.0, (step - optim.lr_warmup_steps) / span)
    share = 1.0 - done if optim.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optim.min_lr + (optim.lr - optim.min_lr) * share
