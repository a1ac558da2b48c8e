"""Every form of a product gives the same numbers, up to the rounding of its type."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rlinf.hardware import cpu_multiplies_bf16
from rlinf.kernels.cpu import Kernels
from rlinf.rollout import linear as module
from rlinf.rollout.linear import MOST_ROWS, InPlaceLinear, head, linear, uses_weight_in_place

# whether our code is compiled, whether the CPU multiplies bf16, the variant of our code (None: the best)
FORMS = {
    "no bf16 instructions": (True, False, "avx2"),
    "bf16 instructions that only oneDNN knows": (True, True, "avx2"),
    "the best": (True, cpu_multiplies_bf16(), None),
    "nothing compiled": (False, cpu_multiplies_bf16(), None),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    compiled, multiplies, variant = FORMS[request.param]
    if compiled and module.kernels() is None:
        pytest.skip("no compiled code for this CPU")
    own = Kernels(variant) if variant else module.kernels() if compiled else None
    monkeypatch.setattr(module, "kernels", lambda: own)
    monkeypatch.setattr(module, "cpu_multiplies_bf16", lambda: multiplies)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("outputs", [3, 96])
def test_a_product_is_x_times_the_weight_plus_the_bias(form: str, dtype: torch.dtype, tolerance: float, outputs: int) -> None:
    torch.manual_seed(1)
    weight, bias = (torch.randn(outputs, 64) / 8).to(dtype), torch.randn(outputs).to(dtype)
    for given in (bias, None):
        product = linear(weight, given)
        for rows in (1, 5, 64, MOST_ROWS + 1):
            x = torch.randn(rows, 64).to(dtype)
            out = product(x)
            exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
            assert out.dtype == dtype and (out - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_exact_in_fp32(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight = torch.randn(500, 64).to(dtype)
    logits = head(weight)
    for rows in (1, 3, 4, 70, MOST_ROWS + 1):
        x = torch.randn(rows, 64).to(dtype)
        assert (out := logits(x)).dtype == torch.float32 and out.shape == (rows, 500)
        assert (out - F.linear(x.double(), weight.double())).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_lies_is_used_where_it_lies_and_what_does_not_is_copied(form: str, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 64).to(dtype)
    product, x = linear(weight, None), torch.randn(5, 64).to(dtype)
    before = product(x)
    here = uses_weight_in_place(dtype, weight.device)
    assert here == isinstance(product, InPlaceLinear)
    by_us = {
        "no bf16 instructions": dtype != torch.float16,
        "bf16 instructions that only oneDNN knows": dtype == torch.float32,
        "the best": dtype == torch.float32 or (dtype == torch.bfloat16 and module.kernels() is not None),
        "nothing compiled": False,
    }
    assert here == by_us[form]
    weight.zero_()
    assert torch.equal(product(x), torch.zeros_like(before) if here else before)
