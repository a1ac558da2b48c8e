"""Published values of the filters of DAPO and RaML."""

from __future__ import annotations

import numpy as np
import pytest

from rlinf.algorithms.advantages import grpo
from rlinf.algorithms.filters import has_signal, update_subset


def test_only_mixed_groups_have_a_signal() -> None:
    assert has_signal([True, False, False])
    assert not has_signal([True] * 4) and not has_signal([False] * 4)


@pytest.mark.parametrize("p, survives", [(0.5, 0.99997), (0.1, 0.8147), (0.9, 0.8147), (0.01, 0.1485), (0.99, 0.1485)])
def test_survival_of_a_group_of_16(p: float, survives: float) -> None:
    assert 1 - p**16 - (1 - p) ** 16 == pytest.approx(survives, abs=1e-4)
    right = np.random.default_rng(0).random((20_000, 16)) < p
    assert np.mean([has_signal(g) for g in right[:4000].tolist()]) == pytest.approx(survives, abs=0.02)


def test_update_subset_is_seeded_exact_and_uniform() -> None:
    for n, chosen in ((0, 0), (1, 1), (3, 3), (4, 4), (9, 4)):
        assert update_subset(1, "2.p", 4, n).sum() == chosen
    assert (update_subset(1, "2.p", 8, 4) == update_subset(1, "2.p", 8, 4)).all()
    masks = np.array([update_subset(7, f"{step}.p{k}", 4, 2) for step in range(40) for k in range(25)])
    assert masks.mean(axis=0) == pytest.approx([0.5] * 4, abs=0.06)


def test_update_subset_keeps_the_scale_of_the_summed_loss() -> None:
    """Over all subsets, the expected sum is n / G of the full one (RaML); advantages are those of all responses."""
    losses = grpo(np.array([1.0, 0, 0, 0])) * np.array([3, 1, 4, 1])
    sums = [losses[update_subset(0, f"{step}.p", 4, 1)].sum() for step in range(4000)]
    assert np.mean(sums) == pytest.approx(losses.sum() / 4, abs=0.15)
