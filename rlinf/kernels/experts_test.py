"""The mixture of experts against a loop over tokens, wholly and in parts, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.kernels.experts import Grouped, grouped_mm, mixture, one_by_one, products, route, router_logits

TOKENS, HIDDEN, EXPERTS, TOP_K = 13, 16, 6, 2
Product = Callable[[Tensor], Grouped]


def plain(x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One token and one expert at a time."""
    out = []
    for x, weights, experts in zip(x_TH, weights_TK, experts_TK):
        parts = []
        for weight, e in zip(weights, experts):
            gate, up = (gate_up[e] @ x).chunk(2)
            parts.append(weight * (down[e] @ (F.silu(gate) * up)))
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out)


def inputs(units: int, seed: int = 0) -> list[Tensor]:
    """x, logits, gate_up, down."""
    g = torch.Generator().manual_seed(seed)
    shapes = (TOKENS, HIDDEN), (TOKENS, EXPERTS), (EXPERTS, 2 * units, HIDDEN), (EXPERTS, HIDDEN, units)
    return [(torch.randn(shape, generator=g) * 0.3).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("normalized", [True, False])
def test_the_weights_of_a_tokens_experts(normalized: bool) -> None:
    """By hand: e^2 : e^1 : e^0 for the experts 1, 3, 0."""
    weights, experts = route(torch.tensor([[0.0, 2.0, -9.0, 1.0]]), 2, normalized)
    assert experts.tolist() == [[1, 3]]
    e = torch.tensor([2.0, 1.0]).exp()
    of_all = e / (e.sum() + 1 + torch.tensor(-9.0).exp())
    torch.testing.assert_close(weights[0], e / e.sum() if normalized else of_all)


def test_logits_of_16_bit_weights_are_not_rounded_to_16_bits() -> None:
    x, router = torch.ones(1, 3, dtype=torch.bfloat16), torch.tensor([[1.0, 0.0, 2**-9]], dtype=torch.bfloat16)
    assert router_logits(x, router).item() == 1 + 2**-9


@pytest.mark.parametrize(("product", "units"), [(grouped_mm, 8), (products, 8), (products, 10)])
@pytest.mark.parametrize("parts", [[6], [3, 3], [1, 4, 1]])
def test_the_parts_add_up_to_what_each_token_gets_by_itself(product: Product, units: int, parts: list[int]) -> None:
    x, logits, gate_up, down = inputs(units)
    weights, experts = route(logits, TOP_K, True)
    wanted = plain(x, weights, experts, gate_up, down)
    shape_of_loss = torch.linspace(-1, 1, TOKENS * HIDDEN).view(TOKENS, HIDDEN)
    gradients = torch.autograd.grad((wanted * shape_of_loss).sum(), [x, logits, gate_up, down], retain_graph=True)
    got, first = torch.zeros(()), 0
    for n in parts:
        here = range(first, first + n)
        own = [product(w[first : first + n]) for w in (gate_up, down)]
        got = got + mixture(x, weights, experts, own[0], own[1], here, EXPERTS)
        first += n
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad((got * shape_of_loss).sum(), [x, logits, gate_up, down]), gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("product", "units"), [(grouped_mm, 8), (products, 10), (products, 64)])  # 64: enough for kernels of our own
def test_ranks_and_experts_without_a_token_give_zeros_and_zero_gradients(product: Product, units: int) -> None:
    x, _, gate_up, down = inputs(units)
    weights, experts = torch.ones(TOKENS, 1), torch.full((TOKENS, 1), 4)
    got = mixture(x, weights, experts, product(gate_up[:3]), product(down[:3]), range(3), EXPERTS)
    assert not got.any()
    assert not any(g.any() for g in torch.autograd.grad((got * torch.ones_like(got)).sum(), [x, gate_up, down]))
    got = mixture(x, weights, experts, product(gate_up[3:]), product(down[3:]), range(3, 6), EXPERTS)
    (of_gate_up,) = torch.autograd.grad(got.square().sum(), [gate_up])
    assert got.any() and [bool(g.any()) for g in of_gate_up] == [False] * 4 + [True, False]


def test_what_torch_leaves_of_an_expert_without_rows_is_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    product = F.grouped_mm

    def leaving_memory(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        out = product(a, b, offs=offs)
        if out.ndim == 3:
            out[1] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", leaving_memory)
    rows, weight = torch.randn(7, 16, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    grouped_mm(weight)(rows, torch.tensor([2, 2, 7])).square().sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all() and not weight.grad[1].any() and weight.grad[2].any()


def test_one_by_one_is_the_grouped_product() -> None:
    rows, weight = torch.randn(7, 16), torch.randn(3, 8, 16)
    ends = torch.tensor([2, 2, 7])
    torch.testing.assert_close(one_by_one([lambda r, w=w: r @ w.T for w in weight])(rows, ends), grouped_mm(weight)(rows, ends))


@pytest.mark.parametrize(
    ("dtype", "units", "grouped"),
    [(torch.bfloat16, 8, True), (torch.bfloat16, 12, False), (torch.float16, 8, False), (torch.float32, 8, False)],
)
def test_the_grouped_product_gets_only_what_gpus_have_it_for(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, units: int, grouped: bool
) -> None:
    called = []
    grouped_product = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: called.append(a) or grouped_product(a, b, offs=offs))
    rows, weight, ends = torch.randn(7, 16, dtype=dtype), torch.randn(3, units, 16, dtype=dtype), torch.tensor([2, 2, 7])
    got = products(weight)(rows, ends)
    torch.testing.assert_close(got, torch.cat([rows[:2] @ weight[0].T, rows[2:] @ weight[2].T]))
    assert bool(called) == grouped
