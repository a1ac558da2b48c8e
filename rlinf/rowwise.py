"""What a decoder does to each row by itself, the same in training and in the embedded engine: RMSNorm, gated SiLU, rotary embedding.

On CPU in our own C where it is there (rlinf/cpu/rows.c): in fp32, rounded once. Else with torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.cpu_kernels import LEAST_LANES, kernels, kernels_for


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / root(mean(x^2) + eps) * weight over the last dimension."""
    own = kernels_for(x.dtype, x.device)
    if own is not None and x.dtype == weight_H.dtype:
        return _RmsNorm.apply(x, weight_H, eps) if torch.is_grad_enabled() else own.norm(_rows(x), weight_H, eps).view(x.shape)
    return F.rms_norm(x, weight_H.shape, weight_H, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of gate and up side by side in the last dimension [..., 2F] -> [..., F]."""
    own = kernels_for(gate_up.dtype, gate_up.device)
    if own is not None and gate_up.shape[-1] >= 2 * LEAST_LANES:
        return _Swiglu.apply(gate_up) if torch.is_grad_enabled() else own.silu(_rows(gate_up)).view(*gate_up.shape[:-1], -1)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x_NAD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotary embedding of halves, Hugging Face's rotate_half; a row's heads lie side by side."""
    own = kernels_for(x_NAD.dtype, x_NAD.device)
    if own is not None and x_NAD.shape[-1] >= 2 * LEAST_LANES:
        return _Rotate.apply(x_NAD, cos_ND, sin_ND) if torch.is_grad_enabled() else own.rotate(_heads(x_NAD), cos_ND, sin_ND)
    a, b = x_NAD.chunk(2, -1)
    return x_NAD * cos_ND[:, None] + torch.cat([-b, a], -1) * sin_ND[:, None]


def _rows(x: Tensor) -> Tensor:
    """[N, H] whose rows are each in one piece."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x_NH = _rows(x)
        scale_N = torch.empty(len(x_NH))
        ctx.save_for_backward(x_NH, weight_H, scale_N)
        return kernels().norm(x_NH, weight_H, eps, scale_N).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_NH, grad_H = kernels().norm_back(*ctx.saved_tensors, _rows(grad))
        return grad_NH.view(grad.shape), grad_H, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up_N2F = _rows(gate_up)
        ctx.save_for_backward(gate_up_N2F)
        return kernels().silu(gate_up_N2F).view(*gate_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return kernels().silu_back(*ctx.saved_tensors, _rows(grad)).view(*grad.shape[:-1], -1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NAD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        ctx.save_for_backward(cos_ND, sin_ND)
        return kernels().rotate(_heads(x_NAD), cos_ND, sin_ND)

    @staticmethod
    def backward(ctx: Any, grad_NAD: Tensor) -> tuple[Tensor | None, ...]:
        return kernels().rotate(_heads(grad_NAD), *ctx.saved_tensors, back=True), None, None


def _heads(x_NAD: Tensor) -> Tensor:
    return x_NAD if x_NAD.stride()[1:] == (x_NAD.shape[2], 1) else x_NAD.contiguous()
