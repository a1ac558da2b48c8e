"""The learning rate at the corners of its schedule."""

import pytest

from rlinf.config.schema import OptimConfig
from rlinf.training.learning_rate import learning_rate


def test_warm_up_is_linear_from_zero_and_then_constant() -> None:
    optim = OptimConfig(lr=4e-5, lr_warmup_steps=4)
    assert [learning_rate(optim, s) for s in (1, 2, 3, 4, 5, 1000)] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 4e-5, 4e-5])
    assert learning_rate(OptimConfig(lr=4e-5), 1) == 4e-5


@pytest.mark.parametrize(("style", "middle"), [("linear", 0.55), ("cosine", 0.55)])
def test_decay_goes_from_lr_to_min_lr_and_stays_there(style: str, middle: float) -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, lr_decay_style=style, lr_warmup_steps=10, lr_decay_steps=30)
    assert learning_rate(optim, 10) == 1.0
    assert learning_rate(optim, 20) == pytest.approx(middle)
    assert learning_rate(optim, 30) == learning_rate(optim, 500) == pytest.approx(0.1)
    rates = [learning_rate(optim, s) for s in range(10, 31)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_is_above_linear_before_the_middle() -> None:
    at = {style: learning_rate(OptimConfig(lr=1.0, lr_decay_style=style, lr_decay_steps=100), 25) for style in ("linear", "cosine")}
    assert at["linear"] == pytest.approx(0.75) and at["cosine"] == pytest.approx(0.5 * (1 + 2**-0.5))
