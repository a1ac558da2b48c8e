"""The supervised loss is plain cross-entropy; the weights by loss are those of arXiv 2502.06733."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.algorithms.supervised import SHAPES, finalize_supervised, lengths_S, loss_weights_S, sample_losses_S, supervised_objective

LOSSES = torch.tensor([1.0, 2.0, 3.0])
EXAMPLES = [
    ("uniform", 1.0, [1 / 3, 1 / 3, 1 / 3]),
    ("lin_upper", 1.0, [0.1554, 0.4223, 0.4223]),
    ("quadratic", 1.0, [0.2119, 0.5761, 0.2119]),
    ("extremes", 1.0, [0.4223, 0.1554, 0.4223]),
    ("upper", 1.0, [0.1863, 0.3072, 0.5065]),
    ("lin_upper", 0.4, [0.0394, 0.4803, 0.4803]),
]
many_losses = st.lists(st.floats(0.0, 20.0), min_size=1, max_size=12)


@pytest.mark.parametrize(("shape", "temperature", "expected"), EXAMPLES)
def test_weights_of_three_losses(shape: str, temperature: float, expected: list[float]) -> None:
    assert loss_weights_S(LOSSES, shape, temperature).tolist() == pytest.approx(expected, abs=5e-5)


def test_the_weighted_loss_of_three_losses() -> None:
    assert (loss_weights_S(LOSSES, "lin_upper", 1.0) * LOSSES).sum().item() == pytest.approx(2.2669, abs=1e-4)
    assert (loss_weights_S(LOSSES, "uniform", 1.0) * LOSSES).sum().item() == pytest.approx(2.0)


@given(losses=many_losses, shape=st.sampled_from(sorted(SHAPES)), shift=st.floats(-3, 3), scale=st.floats(0.1, 10))
def test_weights_sum_to_one_and_do_not_see_shift_or_scale(losses: list[float], shape: str, shift: float, scale: float) -> None:
    values = torch.tensor(losses, dtype=torch.float64).mul(8).round() / 8  # so that equal losses stay equal
    weights = loss_weights_S(values, shape, 0.7)
    assert weights.sum().item() == pytest.approx(1.0) and (weights > 0).all()
    torch.testing.assert_close(loss_weights_S(values * scale + shift, shape, 0.7), weights, rtol=1e-9, atol=1e-12)


@given(losses=many_losses, temperature=st.floats(0.2, 5))
def test_lin_upper_bounds_the_weight_of_outliers(losses: list[float], temperature: float) -> None:
    weights = loss_weights_S(torch.tensor(losses), "lin_upper", temperature)
    assert weights.max() <= weights.min() * math.exp(1 / temperature) * (1 + 1e-9)


def test_equal_losses_weigh_the_same_and_nothing_weighs_nothing() -> None:
    assert loss_weights_S(torch.full((4,), 2.5), "extremes", 0.1).tolist() == [0.25] * 4
    assert loss_weights_S(torch.empty(0), "lin_upper", 1.0).shape == (0,)


def test_no_gradient_flows_through_the_weights() -> None:
    losses = LOSSES.clone().requires_grad_()
    (loss_weights_S(losses, "lin_upper", 1.0) * losses).sum().backward()
    assert losses.grad.tolist() == pytest.approx([0.1554, 0.4223, 0.4223], abs=5e-5)


def test_the_objective_is_cross_entropy_and_its_shares_add_up() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11, requires_grad=True), torch.randint(0, 11, (7,))
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    parts = [supervised_objective(logprobs[s], torch.zeros(7)[s], weights[s]) for s in (slice(0, 3), slice(3, 7), slice(7, 7))]
    loss = sum(part for part, _ in parts)
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected)
    (mine,), (theirs,) = torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(mine, theirs)
    metrics = finalize_supervised(parts[0][1] + parts[1][1] + parts[2][1])
    assert metrics == pytest.approx({"loss": expected.item(), "objective": expected.item(), "entropy": 0.0, "tokens": 7.0})


def test_the_loss_of_a_sample_is_the_mean_of_its_tokens() -> None:
    losses = sample_losses_S(torch.tensor([-1.0, -3.0, -5.0]), torch.tensor([0, 0, 1]), 2)
    assert losses.tolist() == [2.0, 5.0]


def test_at_a_high_temperature_the_weights_are_uniform() -> None:
    for shape in SHAPES:
        assert loss_weights_S(LOSSES, shape, 1e9).tolist() == pytest.approx([1 / 3] * 3, abs=1e-8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data(), st.sampled_from([None, *sorted(SHAPES)]))
def test_loss_gradient_and_metrics_do_not_depend_on_the_split(lengths: list[int], data: st.DataObject, shape: str | None) -> None:
    """Samples dealt to up to 6 micro-batches in any order, some empty; the weights are made of the losses of all of them."""
    generator, n = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20))), sum(lengths)
    logprobs_N, entropy_N = (-torch.rand(n, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    sample_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    bins = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    order = data.draw(st.permutations(range(len(lengths))))

    def run(parts: list[list[int]]) -> tuple[torch.Tensor, dict[str, float]]:
        leaf, metrics, micro = logprobs_N.clone().requires_grad_(), [], []
        for samples in parts:
            where_N = torch.cat([torch.nonzero(sample_N == s).flatten() for s in samples] + [torch.zeros(0, dtype=torch.int64)])
            own_N = torch.cat([torch.full((lengths[s],), i) for i, s in enumerate(samples)] + [torch.zeros(0, dtype=torch.int64)])
            micro.append((where_N, own_N, len(samples)))
        losses_S = torch.cat([sample_losses_S(logprobs_N[where_N], own_N, k) for where_N, own_N, k in micro])
        weights_S = (loss_weights_S(losses_S, shape, 0.7) if shape else torch.ones(len(losses_S), dtype=torch.float64)).split(
            [k for *_, k in micro]
        )
        for (where_N, own_N, k), weight_S in zip(micro, weights_S):
            weights_N = (weight_S / lengths_S(own_N, k))[own_N] if shape else torch.full((len(where_N),), 1 / n, dtype=torch.float64)
            loss, sums = supervised_objective(leaf[where_N], entropy_N[where_N], weights_N)
            loss.backward()
            metrics.append(sums)
        return leaf.grad, finalize_supervised(sum(metrics[1:], metrics[0]))

    gradient, metrics = run([list(range(len(lengths)))])
    split_gradient, split_metrics = run([[s for s in order if bins[s] == b] for b in range(6)])
    assert torch.allclose(split_gradient, gradient, rtol=1e-11, atol=1e-14)
    assert split_metrics == pytest.approx(metrics, rel=1e-11, abs=1e-13)
