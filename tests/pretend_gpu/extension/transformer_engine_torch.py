"""Transformer Engine's C++ extension on a pretend GPU: what unquantized layers call, in torch's operations. All else says its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Missing:
    """An enumeration or a class that is only named, or a function that nobody should come to."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        found = Missing(f"{self._name}.{name}")
        setattr(self, name, found)
        return found

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self._name} is not in the pretend GPU")

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


def __getattr__(name: str) -> Missing:
    if name.startswith("__"):
        raise AttributeError(name)
    found = globals()[name] = Missing(name)
    return found


layernorm_fwd, layernorm_bwd, rmsnorm_bwd_add = map(Missing, ("layernorm_fwd", "layernorm_bwd", "rmsnorm_bwd_add"))  # taken with `*`


def get_cublasLt_version() -> int:
    return 130000


def get_cudnn_version() -> int:
    return 91000


def get_num_cublas_streams() -> int:
    return 4


def generic_gemm(
    a: Tensor, transa: bool, b: Tensor, transb: bool, out: Tensor | None, quantizer: None, out_dtype: Any, bias: Tensor | None,
    bias_type: Any, gelu: bool, gelu_in: None, grad: bool, workspace: Tensor, workspace_size: int, accumulate: bool, *_: Any, **__: Any,
) -> list[Tensor | None]:  # fmt: skip
    """As cuBLAS counts, columns first: b @ a.T for `TN`, b @ a for `NN`, b.T @ a for `NT`."""
    if quantizer is not None or gelu:
        raise NotImplementedError("quantized or fused products are not in the pretend GPU")
    a, b2 = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    product = (b2.t() if transb else b2) @ (a.t() if transa else a)
    if not transb:
        product = product.view(*b.shape[:-1], -1)
    bias_grad = b2.sum(0) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias
    if out is None:
        return [product, bias_grad, None, None]
    out.add_(product) if accumulate else out.copy_(product)
    return [out, bias_grad, None, None]


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: None, otype: Any, margin: int, zero_centered: bool
) -> Any:
    if quantizer is not None or zero_centered:
        raise NotImplementedError("quantized norms are not in the pretend GPU")
    rsigma = (x.float().pow(2).mean(-1) + eps).rsqrt()
    y = (x.float() * rsigma[:, None] * weight.float()).to(x.dtype)
    if out is not None:
        y = out.copy_(y)
    return y, None, rsigma


def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, margin: int, zero_centered: bool) -> Any:
    normed, up = x.float() * rsigma[:, None], dz.float() * weight.float()
    dx = (up - normed * (up * normed).mean(-1, keepdim=True)) * rsigma[:, None]
    return dx.to(x.dtype), (dz.float() * normed).sum(0).to(weight.dtype)


def multi_tensor_l2norm(chunk: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool | None = False) -> Any:
    norms = torch.stack([t.float().norm() for t in tensors[0]])
    return norms.norm()[None], norms if per_tensor else None


def multi_tensor_scale(chunk: int, overflow: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*tensors):
        target.copy_(source * scale)
