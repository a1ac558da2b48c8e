"""Floating-point operations of a decoder, counted from the actual tokens, for the metrics of speed and utilisation (mfu, hfu).

    forward = 2 · (L · W · rows + h · V · heads) + 4 · L · H · D · pairs

L layers with W matrix weights each (of experts: of those that a token goes to, and the router), hidden size h, vocabulary V, H query heads
of dimension D. rows: tokens that go through the layers; heads: positions whose logits are computed; pairs: (query, key) pairs that meet in
attention. A multiplication and an addition are two operations; a backward pass counts as two forward passes, or as update_flops() says
where adapters are trained; norms, softmax and the optimizer are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlinf.config.schema import ActorModelConfig, LoraConfig
from rlinf.scheduling.memory import adapter_parameters
from rlinf.weights.architecture import Architecture


@dataclass(frozen=True)
class Work:
    """What a forward pass has to compute; rows, heads and pairs as above."""

    rows: int = 0
    heads: int = 0
    pairs: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.rows + other.rows, self.heads + other.heads, self.pairs + other.pairs)

    def __rmul__(self, times: int) -> Work:
        return Work(times * self.rows, times * self.heads, times * self.pairs)


def forward_flops(arch: Architecture, work: Work) -> float:
    return 2.0 * (_layers(arch) * work.rows + arch.hidden * arch.vocab * work.heads) + _attention(arch, work)


def update_flops(arch: Architecture, work: Work, lora: LoraConfig) -> float:
    """Forward and backward. Where adapters are trained, no gradient of the other weights is computed: of a matrix the backward pass is
    one product instead of two, of an adapter and of attention it is two."""
    forward = forward_flops(arch, work)
    return 2 * forward + _attention(arch, work) + 3 * adapter_flops(arch, lora, work) if lora.rank else 3 * forward


def adapter_flops(arch: Architecture, lora: LoraConfig, work: Work) -> float:
    """What adapters add to a forward pass."""
    return 2.0 * arch.n_layers * adapter_parameters(arch, lora, 1) * work.rows


def recomputed_flops(arch: Architecture, model: ActorModelConfig, work: Work) -> float:
    """The operations that activation recompute adds to a forward and backward pass."""
    if model.recompute_granularity == "selective":
        return _attention(arch, work)
    return recomputed_layers(model, arch.n_layers) * (2.0 * _layers(arch) * work.rows + _attention(arch, work))


def recomputed_layers(model: ActorModelConfig, n_layers: int) -> float:
    """The share of the layers whose forward pass is computed twice."""
    if model.recompute_granularity != "full":
        return 0.0
    layers = n_layers // model.pipeline_model_parallel_size
    return 1.0 if model.recompute_method == "uniform" else min(model.recompute_num_layers or 0, layers) / layers


def generation_work(prompt: int, responses: Sequence[int]) -> Work:
    """The work of generating a group: the prompt once, then each response token by token. The last token of a response is not fed back."""
    fed = [max(0, n - 1) for n in responses]
    pairs = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in fed)
    return Work(prompt + sum(fed), sum(responses), pairs)


def _layers(arch: Architecture) -> int:
    q, k = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    return arch.n_layers * arch.hidden * (2 * q + 2 * k + 3 * arch.active_mlps * arch.ffn + arch.experts)


def _attention(arch: Architecture, work: Work) -> float:
    return 4.0 * arch.n_layers * arch.n_heads * arch.head_dim * work.pairs
