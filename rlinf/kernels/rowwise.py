"""What a decoder does to each row by itself, the same in training and in the embedded engine: RMSNorm, gated SiLU, rotary embedding.

On CPU in our own C where it is there (rlinf/kernels/c/rows.c): in fp32, rounded once. Else with torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.kernels.cpu import LEAST_LANES, Kernels, kernels_for


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / root(mean(x^2) + eps) * weight over the last dimension."""
    compiled = kernels_for(x.dtype, x.device)
    if compiled is not None and x.dtype == weight_H.dtype:
        return (
            _RmsNorm.apply(compiled, x, weight_H, eps) if torch.is_grad_enabled() else compiled.norm(_rows(x), weight_H, eps).view(x.shape)
        )
    return F.rms_norm(x, weight_H.shape, weight_H, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of gate and up side by side in the last dimension [..., 2F] -> [..., F]."""
    return _Swiglu.apply(gate_up) if torch.is_grad_enabled() else _gated(gate_up)


def rotate(x_NAD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotary embedding of halves, Hugging Face's rotate_half; a row's heads lie side by side."""
    return _Rotate.apply(x_NAD, cos_ND, sin_ND) if torch.is_grad_enabled() else _turned(x_NAD, cos_ND, sin_ND)


def _rows(x: Tensor) -> Tensor:
    """[N, H] whose rows are each in one piece."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: Kernels, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        ctx.compiled, x_NH = compiled, _rows(x)
        scale_N = torch.empty(len(x_NH))
        ctx.save_for_backward(x_NH, weight_H, scale_N)
        return compiled.norm(x_NH, weight_H, eps, scale_N).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NH, weight_H, scale_N = ctx.saved_tensors
        grad_NH, grad_H = ctx.compiled.norm_back(x_NH, weight_H, scale_N, _rows(grad))
        return None, grad_NH.view(grad.shape), grad_H, None


class _Swiglu(torch.autograd.Function):
    """Keeps its input alone; torch's two operations would keep silu(gate), too."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if (compiled := _wide_kernels(gate_up)) is not None:
            return compiled.silu_back(_rows(gate_up), _rows(grad)).view(gate_up.shape)
        out = torch.empty_like(gate_up)
        (gate, up), (to_gate, to_up) = gate_up.chunk(2, -1), out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return out


def _gated(gate_up: Tensor) -> Tensor:
    if (compiled := _wide_kernels(gate_up)) is not None:
        return compiled.silu(_rows(gate_up)).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _wide_kernels(x: Tensor) -> Kernels | None:
    """Our own C, where half a row is long enough for it."""
    return kernels_for(x.dtype, x.device) if x.shape[-1] >= 2 * LEAST_LANES else None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NAD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        ctx.save_for_backward(cos_ND, sin_ND)
        return _turned(x_NAD, cos_ND, sin_ND)

    @staticmethod
    def backward(ctx: Any, grad_NAD: Tensor) -> tuple[Tensor | None, ...]:
        cos_ND, sin_ND = ctx.saved_tensors
        return _turned(grad_NAD, cos_ND, sin_ND, back=True), None, None


def _turned(x_NAD: Tensor, cos_ND: Tensor, sin_ND: Tensor, back: bool = False) -> Tensor:
    """By the angles, or back: both halves of a head have the same."""
    if (compiled := _wide_kernels(x_NAD)) is not None:
        return compiled.rotate(_heads(x_NAD), cos_ND, sin_ND, back=back)
    out = torch.empty(x_NAD.shape, dtype=x_NAD.dtype, device=x_NAD.device)
    (a, b), (to_a, to_b) = x_NAD.chunk(2, -1), out.chunk(2, -1)
    cos, sin = (t_ND[:, None, : a.shape[-1]] for t_ND in (cos_ND, sin_ND))
    sign = -1.0 if back else 1.0
    torch.addcmul(a * cos, b, sin, value=-sign, out=to_a)
    torch.addcmul(b * cos, a, sin, value=sign, out=to_b)
    return out


def _heads(x_NAD: Tensor) -> Tensor:
    return x_NAD if x_NAD.stride()[1:] == (x_NAD.shape[2], 1) else x_NAD.contiguous()
