"""Whether a tensor is finite is told exactly, also where its sum is not."""

import pytest
import torch

from rlinf.weights import finite as module
from rlinf.weights.finite import finite


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(module, "kernels", lambda: None)
    tensor = torch.randn(300, 7).to(dtype)
    assert finite(tensor) and finite(torch.full((300,), torch.finfo(dtype).max, dtype=dtype))  # the sum overflows
    for value in (float("nan"), float("inf"), float("-inf")):
        spoiled = tensor.clone()
        spoiled[211, 3] = value
        assert not finite(spoiled)
    opposite = torch.tensor([float("inf"), float("-inf"), 1.0], dtype=dtype)
    assert not finite(opposite)
