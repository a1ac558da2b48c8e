"""The transformer of the embedded engine: weights in the layout that decodes fastest, and the forward pass over packed tokens.

Legend: N packed tokens, H hidden, A attention heads, K key-value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinf.weights.architecture import Architecture
from rlinf.weights.complete import check_tensors

# attend(layer, queries [N, A, D], keys [N, K, D], values [N, K, D]) -> [N, A * D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

LEAST_ROWS = 4  # of a forward pass: with fewer, matrix products on CPU take another path, and round differently


class Linear:
    """x @ weight.T + bias. On CPU the weight is reordered once for oneDNN instead of at every call (benchmarks/rollout_engine.py).

    What it keeps of a weight on CPU is a copy in any case.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        on_cpu = weight.device.type == "cpu"
        self._packed = on_cpu and torch.backends.mkldnn.is_available()
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._weight = weight.clone() if on_cpu and not self._packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)


@dataclass
class Layer:
    """The weights of one block; q, k, v and gate, up are fused."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class EmbeddedModel:
    """Weights of one dense decoder on one device. load() before use."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device, max_context: int) -> None:
        self.arch = arch
        self.dtype = dtype
        self.device = device
        self._layers: list[Layer] = []
        inverse_D2 = 1.0 / arch.rope_theta ** (torch.arange(0, arch.head_dim, 2).float() / arch.head_dim)
        angle_TD2 = torch.outer(torch.arange(max_context).float(), inverse_D2)
        cos, sin = angle_TD2.cos(), angle_TD2.sin()
        # rotate_half(x) * sin = roll(x, D/2) * (-sin, sin)
        self._cos_TD = torch.cat([cos, cos], -1).to(device, dtype)
        self._sin_TD = torch.cat([-sin, sin], -1).to(device, dtype)

    @torch.inference_mode()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        """Take every weight, or raise ValueError that names the first tensor at fault and change nothing. Returns (tensors, bytes)."""
        arrived = check_tensors(self.arch, tensors)
        self._head = self._head_VH = self._embedding_VH = None  # the new ones go where they were
        self._embedding_VH = self._place(arrived["model.embed_tokens.weight"])
        self._final_norm_H = self._place(arrived["model.norm.weight"])
        head_VH = arrived["model.embed_tokens.weight" if self.arch.tied else "lm_head.weight"]
        self._head = self._make_head(head_VH)
        self._layers = self._layers or [None] * self.arch.n_layers  # type: ignore[list-item]
        for i in range(self.arch.n_layers):  # one layer at a time: at no moment two whole models in memory
            self._layers[i] = self._make_layer(i, arrived)
        return len(arrived), sum(t.nbytes for t in arrived.values())

    def free(self) -> None:
        """Give the weights' memory back; load() before the next use."""
        self._layers = []
        self._head = self._head_VH = self._embedding_VH = None

    @torch.inference_mode()
    def forward(self, token_ids_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """Hidden states [N, H] after the final norm."""
        a = self.arch
        rotated = a.n_heads + a.n_kv_heads
        x_NH = F.embedding(token_ids_N, self._embedding_VH)
        cos_N1D, sin_N1D = self._cos_TD[positions_N][:, None], self._sin_TD[positions_N][:, None]
        for i, layer in enumerate(self._layers):
            qkv = layer.qkv(self._norm(x_NH, layer.input_norm)).view(len(x_NH), rotated + a.n_kv_heads, a.head_dim)
            qk, values = qkv[:, :rotated], qkv[:, rotated:]
            if layer.q_norm is not None and layer.k_norm is not None:
                qk = torch.cat([self._norm(qk[:, : a.n_heads], layer.q_norm), self._norm(qk[:, a.n_heads :], layer.k_norm)], 1)
            qk = torch.addcmul(qk * cos_N1D, qk.roll(a.head_dim // 2, -1), sin_N1D)
            x_NH = x_NH + layer.output(attend(i, qk[:, : a.n_heads], qk[:, a.n_heads :], values))
            gate, up = layer.gate_up(self._norm(x_NH, layer.post_norm)).chunk(2, -1)
            x_NH = x_NH + layer.down(F.silu(gate) * up)
        return self._norm(x_NH, self._final_norm_H)

    @torch.inference_mode()
    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] in float32, accumulated and stored in float32 also for bf16 weights."""
        if self.device.type == "cuda" and self.dtype != torch.float32:
            return torch.mm(hidden_NH, self._head_VH.t(), out_dtype=torch.float32)
        n = len(hidden_NH)
        return self._head(F.pad(hidden_NH.float(), (0, 0, 0, max(0, LEAST_ROWS - n))))[:n]

    def _make_head(self, head_VH: Tensor) -> Linear | None:
        if self.device.type == "cuda" and self.dtype != torch.float32:
            self._head_VH = self._embedding_VH if self.arch.tied else self._place(head_VH)
            return None
        return Linear(self._taken(head_VH).float())  # rounding logits to bf16 would cost 0.06 nats at a logit of 20

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.arch.norm_eps)

    def _taken(self, weight: Tensor) -> Tensor:
        """For a Linear, which on CPU makes a copy itself."""
        return weight.to(self.device, self.dtype, copy=self.device.type == "cuda")

    def _place(self, *parts: Tensor) -> Tensor:
        return joined(parts).to(self.device, self.dtype, copy=True)  # never keep a view of the sender's memory

    def _make_layer(self, index: int, arrived: dict[str, Tensor]) -> Layer:
        def parts(*names: str) -> list[Tensor]:
            keys = [f"model.layers.{index}.{name}" for name in names]
            return [arrived[key] for key in keys if key in arrived]

        def get(*names: str) -> Tensor | None:
            found = parts(*names)
            return self._place(*found) if found else None

        def linear(block: str, *names: str) -> Linear:
            weight = joined(parts(*(f"{block}.{n}_proj.weight" for n in names)))
            return Linear(self._taken(weight), get(*(f"{block}.{n}_proj.bias" for n in names)))

        return Layer(
            input_norm=get("input_layernorm.weight"),
            qkv=linear("self_attn", "q", "k", "v"),
            q_norm=get("self_attn.q_norm.weight"),
            k_norm=get("self_attn.k_norm.weight"),
            output=linear("self_attn", "o"),
            post_norm=get("post_attention_layernorm.weight"),
            gate_up=linear("mlp", "gate", "up"),
            down=linear("mlp", "down"),
        )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; without a copy where they already lie one after another, as the tensors of a bucket do."""
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
