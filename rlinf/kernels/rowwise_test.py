"""What is done row by row, by torch: values as written out, gradients as differences. By our C: cpu_test.py."""

from __future__ import annotations

import torch

from rlinf.kernels.rowwise import rotate, swiglu


def test_gated_silu_and_its_gradient() -> None:
    x = torch.randn(5, 3, 14, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x), gate * torch.sigmoid(gate) * up)
    with torch.no_grad():
        torch.testing.assert_close(swiglu(x), gate * torch.sigmoid(gate) * up)
    assert torch.autograd.gradcheck(swiglu, x)


def test_gated_silu_keeps_its_input_alone() -> None:
    x, kept = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_rotation_is_hugging_faces_and_its_gradient_turns_back() -> None:
    angles = torch.rand(5, 3, dtype=torch.float64) * 7
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(rotate(x, cos, sin), x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None])
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), x)
    turned = rotate(x, cos, sin).detach()
    torch.testing.assert_close(rotate(turned, cos, -sin), x.detach())
