"""The sampler draws from the distribution it reports, and truncates as the words top-k and top-p say."""

import math

import numpy as np
import pytest
import torch

from rlinf.rollout.contract import SamplingParams
from rlinf.rollout.sampling import draw, inverse_cdf, uniform

DRAWS = 20_000


def logits(vocab: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(row: torch.Tensor, params: SamplingParams, draws: int = DRAWS) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    noise = [uniform(3, "g/0", i) for i in range(draws)]
    drawn = draw(row.repeat(draws, 1), [params] * draws, noise)
    return drawn.tokens.numpy(), drawn.logprobs, drawn.truncated_mass


def chi_square_within_bounds(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    expected = probabilities * len(tokens)
    kept = expected > 5
    statistic = ((np.bincount(tokens, minlength=len(probabilities))[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees), f"chi-square {statistic:.1f} with {degrees} degrees of freedom"


@pytest.mark.parametrize("vocab", [11, 128, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax_and_logprobs_are_its(vocab: int, temperature: float) -> None:
    row = logits(vocab)
    tokens, logprobs, truncated = sample(row, SamplingParams(temperature))
    truth = torch.log_softmax(row / temperature, -1)
    chi_square_within_bounds(tokens, truth.exp().double().numpy())
    torch.testing.assert_close(logprobs, truth[torch.from_numpy(tokens)], atol=1e-6, rtol=0)
    assert not truncated.any()


def test_top_k_keeps_the_k_most_likely() -> None:
    row = logits()
    tokens, logprobs, truncated = sample(row, SamplingParams(top_k=3))
    full = torch.softmax(row, -1)
    top = full.topk(3)
    kept = torch.zeros_like(full).scatter(0, top.indices, top.values)
    chi_square_within_bounds(tokens, (kept / kept.sum()).double().numpy())
    assert set(tokens) == set(top.indices.tolist())
    torch.testing.assert_close(truncated, (1 - kept.sum()).expand(DRAWS), atol=1e-6, rtol=0)
    torch.testing.assert_close(logprobs, full.log()[torch.from_numpy(tokens)], atol=1e-6, rtol=0)  # before truncation


@pytest.mark.parametrize(("top_p", "support"), [(0.4, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p: float, support: set[int]) -> None:
    tokens, _, truncated = sample(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), SamplingParams(top_p=top_p), 2000)
    assert set(tokens) == support
    mass = sum([0.5, 0.3, 0.15, 0.05][i] for i in support)
    torch.testing.assert_close(truncated, torch.full((2000,), 1 - mass), atol=1e-6, rtol=0)


def test_top_p_and_top_k_both_cut_the_whole_distribution() -> None:
    """As in SGLang, and not top-p what top-k has left (0.571 and 0.429)."""
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(sample(row, SamplingParams(top_p=0.39, top_k=2), 2000)[0]) == {0}
    tokens, _, truncated = sample(row, SamplingParams(top_p=0.5, top_k=2), 2000)
    assert set(tokens) == {0, 1} == set(sample(row, SamplingParams(top_p=0.9, top_k=2), 2000)[0])
    torch.testing.assert_close(truncated, torch.full((2000,), 0.3), atol=1e-6, rtol=0)


def test_greedy_takes_the_most_likely_with_logprobs_of_temperature_one() -> None:
    row = logits()
    tokens, logprobs, _ = sample(row, SamplingParams(temperature=0), 5)
    assert set(tokens) == {int(row.argmax())}
    torch.testing.assert_close(logprobs, torch.log_softmax(row, -1).max().expand(5), atol=1e-6, rtol=0)


def test_rows_with_different_parameters_do_not_touch_each_other() -> None:
    rows = torch.stack([logits(300, seed) for seed in range(4)])
    params = [SamplingParams(0), SamplingParams(0.7, top_k=5), SamplingParams(1.3), SamplingParams(1.0, top_p=0.8)]
    noise = [uniform(0, f"s/{i}", 0) for i in range(4)]
    together = draw(rows.clone(), params, noise)
    for i in range(4):
        alone = draw(rows[i : i + 1].clone(), params[i : i + 1], noise[i : i + 1])
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[i], together.logprobs[i])
        assert alone.truncated_mass[0] == together.truncated_mass[i]


def test_noise_is_uniform_and_distinct_by_each_part_of_its_key() -> None:
    values = np.array([uniform(seed, f"p{sample}/0", position) for seed in range(10) for sample in range(10) for position in range(100)])
    assert len(set(values)) == 10_000 and values.min() >= 0 and values.max() < 1
    chi_square_within_bounds((values * 20).astype(int), np.full(20, 1 / 20))
    assert uniform(1, "a/11", 1) != uniform(1, "a/1", 11) and uniform(1, "a", 1) == uniform(1, "a", 1)


def test_inverse_cdf_never_returns_an_impossible_token() -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    for target, index in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (1.0, 3), (1.5, 3)):
        assert inverse_cdf(weights, torch.tensor([target], dtype=torch.float64))[0].item() == index


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.tensor([[0.0, float("nan")]]), [SamplingParams()], [0.5])
