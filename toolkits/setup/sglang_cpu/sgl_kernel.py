"""Stands in for SGLang's kernel package on a CPU without AMX, where PyPI has no build of it.

SGLang's CPU path imports names `*_cpu` when its modules load; without AMX the layers themselves are plain torch. What decoding
needs is written in torch below; every other name exists and refuses to be called.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out_cache_loc: Tensor, pool_len: int
) -> None:
    """Note in req_to_token[request, start:end] where the new tokens of each request are cached."""
    taken = 0
    for row, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist()):
        req_to_token[row, first:last] = out_cache_loc[taken : taken + last - first].to(req_to_token.dtype)
        taken += last - first


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__") or not name.endswith("_cpu"):
        raise AttributeError(name)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"sgl_kernel.{name} has no stand-in (toolkits/setup/sglang_cpu/sgl_kernel.py); it needs SGLang's own kernels")

    return refuse
