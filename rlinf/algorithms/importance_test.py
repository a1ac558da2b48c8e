"""Published values of the corrections for the rollout engine."""

from __future__ import annotations

import math

import pytest
import torch

from rlinf.algorithms.importance import geometric_mask, k3_mask, sequence_truncated, token_mask, token_truncated

ONE = torch.zeros(10, dtype=torch.int64)


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def test_token_truncation_and_mask() -> None:
    assert token_truncated(logs(3, 1 / 3, 1), 2.0).tolist() == pytest.approx([2, 1 / 3, 1])
    assert token_truncated(logs(3), 1.0).tolist() == [1]
    assert token_mask(logs(3, 1 / 3, 1.5), 0.5, 2.0).tolist() == pytest.approx([0, 0, 1.5])


def test_sequence_weights_grow_with_length() -> None:
    assert sequence_truncated(logs(*[1.1] * 10), ONE, 1, 1e9)[0].item() == pytest.approx(2.5937, abs=1e-4)
    assert sequence_truncated(logs(*[1.1] * 100), torch.zeros(100, dtype=torch.int64), 1, 1e9)[0].item() == pytest.approx(13780.6, abs=0.1)
    assert sequence_truncated(logs(*[1.1] * 10), ONE, 1, 2.0).tolist() == [2.0] * 10


def test_rejection_of_whole_responses() -> None:
    log_rho, sample_N = logs(1.001, 0.9995, 1.2, 1.2), torch.tensor([0, 0, 1, 1])
    assert geometric_mask(log_rho, sample_N, 2, 0.999, 1.001).tolist() == [1, 1, 0, 0]
    k3 = 1.2 - math.log(1.2) - 1
    assert k3_mask(log_rho, sample_N, 2, 0.9 * k3).tolist() == [1, 1, 0, 0]
    assert k3_mask(log_rho, sample_N, 2, 1.1 * k3).tolist() == [1, 1, 1, 1]


def test_equal_engines_are_left_alone_and_nan_is_never_hidden() -> None:
    same, nan = torch.zeros(10, dtype=torch.float64), torch.full((10,), torch.nan, dtype=torch.float64)
    for weight in (
        lambda x: token_truncated(x, 2.0), lambda x: token_mask(x, 0.5, 2.0), lambda x: sequence_truncated(x, ONE, 1, 2.0),
        lambda x: geometric_mask(x, ONE, 1, 0.999, 1.001), lambda x: k3_mask(x, ONE, 1, 0.001),
    ):  # fmt: skip
        assert (weight(same) == 1).all() and weight(nan).isnan().all()
