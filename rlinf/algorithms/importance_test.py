"""Published values of the corrections for the rollout engine."""

from __future__ import annotations

import math

import pytest
import torch

from rlinf.algorithms.importance import CORRECTIONS, Correction, importance_weights

ONE = torch.zeros(10, dtype=torch.int64)


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def weights(kind: str, log_rho: torch.Tensor, low: float, high: float, sample: list[int] | None = None) -> list[float]:
    """All tokens in one sample unless `sample` says otherwise."""
    sample_N = torch.tensor(sample or [0] * len(log_rho))
    return importance_weights(Correction(kind, low, high), log_rho, sample_N, int(sample_N.max()) + 1).weight_N.tolist()


def test_token_truncation_and_mask() -> None:
    assert weights("token-truncate", logs(3, 1 / 3, 1), 0, 2.0) == pytest.approx([2, 1 / 3, 1])
    assert weights("token-truncate", logs(3), 0, 1.0) == [1]
    assert weights("token-mask", logs(3, 1 / 3, 1.5), 0.5, 2.0) == pytest.approx([0, 0, 1.5])


def test_sequence_weights_grow_with_length() -> None:
    assert weights("sequence-truncate", logs(*[1.1] * 10), 0, 1e9)[0] == pytest.approx(2.5937, abs=1e-4)
    assert weights("sequence-truncate", logs(*[1.1] * 100), 0, 1e9)[0] == pytest.approx(13780.6, abs=0.1)
    assert weights("sequence-truncate", logs(*[1.1] * 10), 0, 2.0) == [2.0] * 10
    assert weights("geometric-truncate", logs(*[1.1] * 100), 0, 2.0) == pytest.approx([1.1] * 100)  # its length does not matter
    assert weights("geometric-truncate", logs(2.0, 8.0), 0, 3.0) == [3.0, 3.0]


def test_a_sequence_mask_keeps_the_product_or_nothing() -> None:
    log_rho, sample = logs(2.0, 0.75, 2.0, 1.5, 0.5, 0.5), [0, 0, 1, 1, 2, 2]
    assert weights("sequence-mask", log_rho, 0.5, 2.0, sample) == pytest.approx([1.5, 1.5, 0, 0, 0, 0])


def test_rejection_of_whole_responses() -> None:
    log_rho, sample = logs(1.001, 0.9995, 1.2, 1.2), [0, 0, 1, 1]
    assert weights("geometric-mask", log_rho, 0.999, 1.001, sample) == [1, 1, 0, 0]
    k3 = 1.2 - math.log(1.2) - 1
    assert weights("k3-mask", log_rho, 0.9, 0.9 * k3, sample) == [1, 1, 0, 0]
    assert weights("k3-mask", log_rho, 0.9, 1.1 * k3, sample) == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_equal_engines_are_left_alone_and_nan_is_never_hidden(kind: str) -> None:
    same = importance_weights(Correction(kind, 0.999, 1.001), torch.zeros(10, dtype=torch.float64), ONE, 1)
    assert (same.weight_N == 1).all() and not same.limited_N.any()
    assert importance_weights(Correction(kind, 0.5, 2.0), torch.full((10,), torch.nan, dtype=torch.float64), ONE, 1).weight_N.isnan().all()


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_what_is_limited_is_counted_and_carries_no_gradient(kind: str) -> None:
    log_rho = logs(1.0, 1.0, 4.0, 4.0).requires_grad_()
    found = importance_weights(Correction(kind, 0.5, 1.3), log_rho, torch.tensor([0, 0, 1, 1]), 2)
    assert found.limited_N.tolist() == [False, False, True, True]
    assert found.weight_N.tolist() == [1, 1, *([1.3] * 2 if kind.endswith("truncate") else [0, 0])]
    assert not found.weight_N.requires_grad


def test_bounds_are_checked() -> None:
    for bad in (("nope", 0.0, 1.0), ("token-truncate", 0.0, 0.0), ("token-mask", 2.0, 1.0)):
        with pytest.raises(ValueError):
            Correction(*bad)
