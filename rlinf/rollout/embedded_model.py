"""The transformer of the embedded engine: weights in the form that decodes fastest, and the forward pass over packed tokens.

Legend: N packed tokens, H hidden, A attention heads, K key-value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.kernels.experts import Grouped, mixture, route, router_logits
from rlinf.kernels.rowwise import rms_norm, rotate, swiglu
from rlinf.rollout.linear import Linear, grouped, head, linear, uses_weight_in_place
from rlinf.weights.architecture import Architecture
from rlinf.weights.complete import check_tensors

# attend(layer, queries [N, A, D], keys [N, K, D], values [N, K, D]) -> [N, A * D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class DenseMLP:
    """One MLP for all tokens; gate and up are fused."""

    gate_up: Linear
    down: Linear

    def __call__(self, x_NH: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x_NH)))


@dataclass
class ExpertsMLP:
    """A mixture of experts."""

    arch: Architecture
    router_EH: Tensor
    gate_up: Grouped
    down: Grouped

    def __call__(self, x_NH: Tensor) -> Tensor:
        a = self.arch
        weights_NK, experts_NK = route(router_logits(x_NH, self.router_EH), a.top_k, a.normalized_routing)
        return mixture(x_NH, weights_NK, experts_NK, self.gate_up, self.down, range(a.experts), a.experts)


@dataclass
class Layer:
    """The weights of one block; q, k and v are fused."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    post_norm: Tensor
    mlp: DenseMLP | ExpertsMLP


@dataclass
class Ends:
    """The weights before and behind the blocks."""

    embedding_VH: Tensor
    final_norm_H: Tensor
    head: Linear


class EmbeddedModel:
    """Weights of one decoder on one device. load() before use."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device, max_context: int) -> None:
        self.arch = arch
        self.dtype = dtype
        self.device = device
        self._layers: list[Layer] = []
        self._ends: Ends | None = None
        inverse_D2 = 1.0 / arch.rope_theta ** (torch.arange(0, arch.head_dim, 2).float() / arch.head_dim)
        angle_TD2 = torch.outer(torch.arange(max_context).float(), inverse_D2)
        cos, sin = angle_TD2.cos(), angle_TD2.sin()
        self._cos_TD = torch.cat([cos, cos], -1).to(device, dtype)
        self._sin_TD = torch.cat([sin, sin], -1).to(device, dtype)

    @torch.inference_mode()
    def load(self, tensors: Iterable[tuple[str, Tensor]], keep: bool = False) -> tuple[int, int]:
        """Take every weight, or raise ValueError that names the first tensor at fault and change nothing. Returns (tensors, bytes).
        Where memory runs out on the way, the model is left without weights, never with those of two versions.

        keep: nobody writes to the tensors' memory as long as this model refers to it, so that weights used in place need no copy.
        """
        arrived = check_tensors(self.arch, tensors)
        self._in_place = uses_weight_in_place(self.dtype, self.device)
        self._keep = keep and self._in_place
        self._ends = None  # the new ones go where they were
        embedding_VH = self._own(arrived["model.embed_tokens.weight"])
        logits = head(embedding_VH if self.arch.tied else self._own(arrived["lm_head.weight"]))
        ends = Ends(embedding_VH, self._own(arrived["model.norm.weight"]), logits)
        self._layers = self._layers or [None] * self.arch.n_layers  # type: ignore[list-item]  # for a moment
        for i in range(self.arch.n_layers):  # one layer at a time: at no moment two whole models in memory
            self._layers[i] = self._make_layer(i, arrived)
        self._ends = ends
        return len(arrived), sum(t.nbytes for t in arrived.values())

    def free(self) -> None:
        """Give the weights' memory back; load() before the next use."""
        self._layers, self._ends = [], None

    @property
    def ends(self) -> Ends:
        if self._ends is None:
            raise RuntimeError("the model has no weights: load() before use")
        return self._ends

    @torch.inference_mode()
    def forward(self, token_ids_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """Hidden states [N, H] after the final norm."""
        a = self.arch
        rotated = a.n_heads + a.n_kv_heads
        x_NH = F.embedding(token_ids_N, self.ends.embedding_VH)
        cos_ND, sin_ND = self._cos_TD[positions_N], self._sin_TD[positions_N]
        for i, layer in enumerate(self._layers):
            qkv = layer.qkv(self._norm(x_NH, layer.input_norm)).view(len(x_NH), rotated + a.n_kv_heads, a.head_dim)
            qk, values = qkv[:, :rotated], qkv[:, rotated:]
            if layer.q_norm is not None and layer.k_norm is not None:
                qk = torch.cat([self._norm(qk[:, : a.n_heads], layer.q_norm), self._norm(qk[:, a.n_heads :], layer.k_norm)], 1)
            qk = rotate(qk, cos_ND, sin_ND)
            x_NH += layer.output(attend(i, qk[:, : a.n_heads], qk[:, a.n_heads :], values))
            x_NH += layer.mlp(self._norm(x_NH, layer.post_norm))
        return self._norm(x_NH, self.ends.final_norm_H)

    @torch.inference_mode()
    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] in float32, accumulated and stored in float32 also for bf16 weights."""
        return self.ends.head(hidden_NH)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.arch.norm_eps)

    def _own(self, *parts: Tensor) -> Tensor:
        return joined(parts).to(self.device, self.dtype, copy=not self._keep)

    def _matrix(self, *parts: Tensor) -> Tensor:
        """For a product, which makes a copy itself where it needs another form."""
        return joined(parts).to(self.device, self.dtype, copy=self._in_place and not self._keep)

    def _make_layer(self, index: int, arrived: dict[str, Tensor]) -> Layer:
        def parts(*names: str) -> list[Tensor]:
            keys = [f"model.layers.{index}.{name}" for name in names]
            return [arrived[key] for key in keys if key in arrived]

        def get(*names: str) -> Tensor | None:
            found = parts(*names)
            return self._own(*found) if found else None

        def matrix(block: str, *names: str) -> Tensor:
            return self._matrix(*parts(*(f"{block}.{n}_proj.weight" for n in names)))

        def product(block: str, *names: str) -> Linear:
            return linear(matrix(block, *names), get(*(f"{block}.{n}_proj.bias" for n in names)))

        def mlp() -> DenseMLP | ExpertsMLP:
            if not self.arch.experts:
                return DenseMLP(product("mlp", "gate", "up"), product("mlp", "down"))
            experts = [f"mlp.experts.{e}" for e in range(self.arch.experts)]
            gate_up, down = (grouped([matrix(e, *names) for e in experts]) for names in (("gate", "up"), ("down",)))
            return ExpertsMLP(self.arch, self._own(*parts("mlp.gate.weight")), gate_up, down)

        return Layer(
            input_norm=self._own(*parts("input_layernorm.weight")),
            qkv=product("self_attn", "q", "k", "v"),
            q_norm=get("self_attn.q_norm.weight"),
            k_norm=get("self_attn.k_norm.weight"),
            output=product("self_attn", "o"),
            post_norm=self._own(*parts("post_attention_layernorm.weight")),
            mlp=mlp(),
        )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; without a copy where they are already side by side in memory, as the tensors of a bucket are."""
    first = parts[0]
    if len(parts) == 1:
        return first
    storage = first.untyped_storage().data_ptr()
    ends = [p.data_ptr() + p.nbytes for p in parts]
    if all(p.is_contiguous() and p.untyped_storage().data_ptr() == storage for p in parts) and ends[:-1] == [
        p.data_ptr() for p in parts[1:]
    ]:
        return first.as_strided((sum(len(p) for p in parts), *first.shape[1:]), first.stride())
    return torch.cat(list(parts))
