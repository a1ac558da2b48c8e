"""The value loss, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.values import ValueSettings, ValueTokens, finalize_value_metrics, value_objective


def tokens(
    values: list[float], old: list[float], returns: list[float], mask: list[int] | None = None, samples: list[int] | None = None
) -> ValueTokens:
    samples = samples or [0] * len(values)
    return ValueTokens(
        torch.tensor(values, requires_grad=True), torch.tensor(old), torch.tensor(returns), torch.tensor(mask or [1] * len(values)),
        torch.tensor(samples), max(samples) + 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # within the clip range: (V - R)^2 / 2
        (0.5, 0.0, 1.0, 0.32, 0.0),  # moved towards the target beyond 0.2: (0.2 - 1)^2 / 2, and no gradient
        (-0.5, 0.0, 1.0, 1.125, -1.5),  # moved away from it: the worse of the two counts, with its gradient
        (0.5, 0.0, 0.1, 0.08, 0.4),  # overshot: the distance from the value itself is the larger one
    ],
)
def test_value_clipping(value: float, old: float, target: float, loss: float, gradient: float) -> None:
    batch = tokens([value], [old], [target])
    got, _ = value_objective(batch, Denominators(1, 1), ValueSettings("token-mean", 0.2, 16))
    got.backward()
    assert got.item() == pytest.approx(loss) and batch.values_N.grad.item() == pytest.approx(gradient)


def test_without_clipping_the_loss_is_half_the_squared_error() -> None:
    batch = tokens([0.5], [0.0], [1.0])
    got, metrics = value_objective(batch, Denominators(1, 1), ValueSettings("token-mean", None, 16))
    assert got.item() == pytest.approx(0.125) and metrics.sums["clipped"].item() == 0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token-mean", 10 / 6), ("seq-mean-token-mean", 1.5), ("seq-mean-token-sum", 5.0), ("seq-mean-token-sum-norm", 0.625)],
)
def test_the_value_loss_aggregates_as_the_policy_loss(mode: str, expected: float) -> None:
    """Token losses [1, 1] and [2, 2, 2, 2], L_max = 8."""
    error = [2**0.5] * 2 + [2.0] * 4
    batch = tokens(error, error, [0.0] * 6, samples=[0, 0, 1, 1, 1, 1])
    loss, _ = value_objective(batch, Denominators(6, 2), ValueSettings(mode, 0.5, 8))
    assert loss.item() == pytest.approx(expected)


def test_parts_of_a_mini_batch_add_up_and_masked_tokens_do_not_count() -> None:
    """10 tokens of loss 1 in one micro-batch and 30 of loss 2 in another: 70 / 40."""
    settings_, denominators = ValueSettings("token-mean", None, 16), Denominators(40, 4)
    one = tokens([2**0.5] * 10 + [float("nan")], [0.0] * 11, [0.0] * 11, mask=[1] * 10 + [0])
    two = tokens([2.0] * 30, [0.0] * 30, [0.0] * 30)
    (a, left), (b, right) = (value_objective(t, denominators, settings_) for t in (one, two))
    assert a.item() + b.item() == pytest.approx(1.75)
    assert finalize_value_metrics(left + right)["critic/loss"] == pytest.approx(1.75)
    a.backward()
    assert one.values_N.grad[-1] == 0


def test_metrics_of_a_good_and_a_useless_critic() -> None:
    settings_ = ValueSettings("token-mean", 0.2, 16)
    returns = [1.0, -1.0, 1.0, 3.0]
    read = lambda old: finalize_value_metrics(value_objective(tokens(old, old, returns), Denominators(4, 1), settings_)[1])
    good, shifted, useless = read(returns), read([r - 2 for r in returns]), read([1.0] * 4)
    assert good["critic/explained_variance"] == pytest.approx(1.0) and good["critic/value_error"] == 0
    assert shifted["critic/explained_variance"] == pytest.approx(1.0) and shifted["critic/value_error"] == pytest.approx(2.0)
    assert useless["critic/explained_variance"] == pytest.approx(0.0) and useless["critic/value_error_max"] == pytest.approx(2.0)
    assert useless["critic/return_mean"] == pytest.approx(1.0) and useless["critic/value_mean"] == pytest.approx(1.0)
    same = finalize_value_metrics(value_objective(tokens([0.0], [0.0], [5.0]), Denominators(1, 1), settings_)[1])
    assert np.isnan(same["critic/explained_variance"])  # returns that are all equal have no variance to explain
    nothing = finalize_value_metrics(value_objective(tokens([0.0], [0.0], [5.0], mask=[0]), Denominators(0, 1), settings_)[1])
    assert nothing.pop("critic/loss") == 0 and all(np.isnan(v) for v in nothing.values())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8), st.data(), st.sampled_from([0.0, 0.3, 0.8]), st.sampled_from([None, 0.2]),
    st.sampled_from(["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]),
)  # fmt: skip
def test_loss_gradient_and_metrics_do_not_depend_on_the_split(
    lengths: list[int], data: st.DataObject, masked: float, clip: float | None, mode: str
) -> None:
    """Samples dealt to up to 6 micro-batches in any order; some empty, some samples fully masked."""
    rng, n = np.random.default_rng(data.draw(st.integers(0, 2**20))), sum(lengths)
    numbers = torch.from_numpy(rng.normal(size=(3, n)))
    mask_N, sample_N = torch.from_numpy(rng.random(n) >= masked), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    numbers[2] = torch.where(mask_N, numbers[2], torch.nan)  # nothing is known of what does not count
    counts_S = torch.bincount(sample_N[mask_N], minlength=len(lengths))
    denominators, how = Denominators(int(counts_S.sum()), int((counts_S > 0).sum())), ValueSettings(mode, clip, 8)
    bins = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    order = data.draw(st.permutations(range(len(lengths))))

    def run(parts: list[list[int]]) -> tuple[float, torch.Tensor, dict[str, float]]:
        loss, metrics, values_N = 0.0, [], numbers[0].clone().requires_grad_()
        for samples in parts:
            where_N = torch.cat([torch.nonzero(sample_N == s).flatten() for s in samples] + [torch.zeros(0, dtype=torch.int64)])
            own_N = torch.cat([torch.full((lengths[s],), i) for i, s in enumerate(samples)] + [torch.zeros(0, dtype=torch.int64)])
            part, sums = value_objective(
                ValueTokens(values_N[where_N], numbers[1][where_N], numbers[2][where_N], mask_N[where_N], own_N, len(samples)),
                denominators,
                how,
            )
            part.backward()
            loss += part.item()
            metrics.append(sums)
        return loss, values_N.grad, finalize_value_metrics(sum(metrics[1:], metrics[0]))

    loss, gradient, metrics = run([list(range(len(lengths)))])
    split_loss, split_gradient, split_metrics = run([[s for s in order if bins[s] == b] for b in range(6)])
    assert np.isfinite(loss) and split_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
    assert torch.allclose(split_gradient, gradient, rtol=1e-12, atol=1e-15)
    assert split_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-12, nan_ok=True)
