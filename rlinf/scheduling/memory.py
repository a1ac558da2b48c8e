"""How many bytes a rank needs, computed from shapes alone: weights, gradients, optimizer and activations of actor, critic and token reward
model, weights and KV cache of an engine.

Legend: q and k query and key-value width (heads x head dimension).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlinf.config.schema import ActorModelConfig, Config, LoraConfig
from rlinf.rollout.limits import kv_tokens_on_cpu
from rlinf.weights.architecture import Architecture
from rlinf.weights.mapping import adapter_rules, adapter_shapes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LOGITS_CHUNK = {"cpu": 1 << 27, "gpu": 1 << 30}  # training.logprobs: logits of one chunk
LOGITS_BLOCK = 1 << 26  # and fp32 numbers of a part of it
BLOCK_COPIES = 3  # logits, their exponentials or gradient, a temporary


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a Megatron role.

    activations: kept for the backward pass. workspace: the maximum of what the head needs, and of what the backward pass of a layer needs
    with the layers that are recomputed for it; these are never there at the same time. logits: what the head's one chunk of logits takes of
    the former, and logits_tokens: the tokens in it; 0 on a rank without the vocabulary's head.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    logits: int
    logits_tokens: int

    @property
    def total(self) -> int:
        return self.held + self.activations + self.workspace

    @property
    def held(self) -> int:
        """What stays between two passes."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class EngineMemory:
    """Memory of one device of an engine: bytes of its weights, bytes of the KV cache for one token, and how many tokens the KV cache must
    hold at least."""

    weights: int
    kv_token: int
    tokens: int


def layer_parameters(arch: Architecture, tp: int) -> int:
    """Parameters of one layer on one tensor-parallel rank."""
    q, k = arch.n_heads * arch.head_dim // tp, arch.n_kv_heads * arch.head_dim // tp
    attention = (q + 2 * k) * (arch.hidden + arch.qkv_bias) + q * arch.hidden
    mlps = arch.mlps * 3 * arch.hidden * arch.ffn // tp + arch.experts * arch.hidden
    return attention + mlps + 2 * arch.hidden + 2 * arch.head_dim * arch.qk_norm


def rank_parameters(arch: Architecture, tp: int, pp: int, stage: int, head: str = "lm") -> int:
    """Parameters of one rank of a pipeline stage. The vocabulary is padded to a multiple of tp. A tied head shares the embedding's weights
    on a single stage; on several stages the first and the last have a copy each. head: `scalar` = one number for each token."""
    vocabulary = -(-arch.vocab // tp) * arch.hidden
    first, last = stage == 0, stage == pp - 1
    tables = first if head == "scalar" else first + last if not arch.tied or pp > 1 else 1
    return arch.n_layers // pp * layer_parameters(arch, tp) + tables * vocabulary + last * arch.hidden * (2 if head == "scalar" else 1)


def adapter_parameters(arch: Architecture, lora: LoraConfig, tp: int) -> int:
    """Parameters of the adapters of one layer on one tensor-parallel rank."""
    shapes = adapter_shapes(arch, lora.rank, lora.target_modules)
    rules = adapter_rules(arch, range(1), lora.target_modules)
    return sum(math.prod(shapes[name]) // (tp if rule.sharded else 1) for rule in rules for name in rule.hf) if lora.rank else 0


def adapter_outputs(arch: Architecture, lora: LoraConfig) -> int:
    """Numbers of a token that the A of one layer's adapters give."""
    return lora.rank * sum(len(rule.hf) for rule in adapter_rules(arch, range(1), lora.target_modules)) // 2


def trained_parameters(arch: Architecture, config: Config, role: str, stage: int) -> int:
    """Parameters of one rank of a role that an optimizer steps."""
    section, head = getattr(config, role), config.head_of(role)
    tp, pp = section.model.tensor_model_parallel_size, section.model.pipeline_model_parallel_size
    if not hasattr(section, "optim"):
        return 0
    if not section.lora.rank:
        return rank_parameters(arch, tp, pp, stage, head)
    return arch.n_layers // pp * adapter_parameters(arch, section.lora, tp) + (arch.hidden if head == "scalar" and stage == pp - 1 else 0)


def rank_memory(arch: Architecture, config: Config, role: str, dp: int, stage: int, gpu: bool) -> RankMemory:
    """Memory of a rank of one of config.megatron_roles with the largest micro-batch that runner.max_tokens_per_mbs allows. Gradients are
    fp32; master weights (in 16-bit training) and Adam's two moments are fp32, and divided over the data- and context-parallel ranks; all of
    these are of the adapters alone where there are some. A frozen model has neither, and keeps nothing for a backward pass."""
    section, head = getattr(config, role), config.head_of(role)
    model, frozen, lora = section.model, not hasattr(section, "optim"), getattr(section, "lora", LoraConfig())
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    size, tokens = BYTES[model.precision], -(-config.runner.max_tokens_per_mbs // cp)
    parameters = rank_parameters(arch, tp, pp, stage, head) + arch.n_layers // pp * adapter_parameters(arch, lora, tp)
    trained, low = trained_parameters(arch, config, role, stage), adapter_outputs(arch, lora)
    kept, again = (
        (0, layer_activations(arch, model, tokens, gpu)) if frozen else stage_activations(arch, model, tokens, pp - stage, gpu, low)
    )
    at_head = head_memory(arch, model, tokens, gpu, trained=not lora.rank) if head == "lm" else 3 * tokens * arch.hidden * size
    logits_tokens, logits = logits_chunk(arch, model, tokens, gpu) if head == "lm" and stage == pp - 1 else (0, 0)
    return RankMemory(
        parameters,
        weights=parameters * size,
        gradients=trained * 4,
        optimizer=-(-trained * (8 if size == 4 else 12) // (dp * cp)),
        activations=kept,
        workspace=max(again, at_head if stage == pp - 1 else 0),
        logits=logits,
        logits_tokens=logits_tokens,
    )


def layer_activations(arch: Architecture, model: ActorModelConfig, tokens: int, gpu: bool, low: int = 0) -> int:
    """What one layer keeps of a rank's tokens for its backward pass: inputs of its two norms and of the first matrix, of attention (keys
    and values of all context-parallel ranks; repeated for the query heads where it is not flash attention on a GPU) and of the norms before
    it, its output twice, and what the MLP keeps; low: numbers that adapters keep of a token."""
    tp = model.tensor_model_parallel_size
    hidden = 3 * arch.hidden // (tp if model.sequence_parallel else 1)
    q, k = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    if model.recompute_granularity == "selective":
        attention = 2 * q + 2 * k
    else:
        attention = 3 * q + 2 * model.context_parallel_size * (k if gpu and model.precision != "fp32" else q)
    attention += (q + 2 * k) * arch.qk_norm
    return tokens * (BYTES[model.precision] * (hidden + attention // tp + low) + mlp_activations(arch, model))


def mlp_activations(arch: Architecture, model: ActorModelConfig) -> int:
    """Bytes that a layer's MLP keeps of a token: inputs of its first matrix, of the activation function and of the last matrix. Of experts
    once for each that the token goes to, as if these were divided evenly among the tensor-parallel ranks, before and after their weight;
    and for the router the input, its softmax and the order of the rows."""
    tp, size = model.tensor_model_parallel_size, BYTES[model.precision]
    shared = tp if model.sequence_parallel else 1
    if not arch.experts:
        return size * (arch.hidden // shared + 3 * arch.ffn // tp)
    return size * arch.top_k * (arch.hidden + 4 * arch.ffn) // tp + 4 * (arch.hidden // shared + arch.experts) + 32 * arch.top_k


def mlp_gradients(arch: Architecture, model: ActorModelConfig, tokens: int) -> int:
    """Bytes of the gradients that are there at once in the backward pass of an MLP. Of experts at its begin those of a rank's rows and of
    their units; at its end, when their inputs are gone, the rows of all experts of a token before they are added up; and the gradient of a
    rank's largest weight."""
    tp, size = model.tensor_model_parallel_size, BYTES[model.precision]
    if not arch.experts:
        return tokens * size * (2 * arch.hidden + 4 * arch.ffn // tp)
    rows = arch.top_k * max((arch.hidden + 2 * arch.ffn) // tp, arch.hidden - 4 * arch.ffn // tp)
    return size * (tokens * (2 * arch.hidden + rows) + 2 * arch.ffn * arch.hidden * arch.experts // tp)


def stage_activations(arch: Architecture, model: ActorModelConfig, tokens: int, in_flight: int, gpu: bool, low: int = 0) -> tuple[int, int]:
    """Of one pipeline stage, which holds `in_flight` micro-batches at once (one forward, one backward: the first stage holds them all):
    (what is kept, what is there while a layer's backward pass runs: layers that are computed again, gradients of its widest part)."""
    layers = arch.n_layers // model.pipeline_model_parallel_size
    gradients = mlp_gradients(arch, model, tokens)
    residual = tokens * BYTES[model.precision] * arch.hidden // (model.tensor_model_parallel_size if model.sequence_parallel else 1)
    whole = layer_activations(arch, model, tokens, gpu, low)
    count = min(model.recompute_num_layers or 0, layers)
    if model.recompute_granularity != "full":
        return in_flight * (layers * whole + residual), gradients
    if model.recompute_method == "uniform":
        return in_flight * -(-layers // count) * residual, count * whole + gradients
    # the first `count` layers are computed again: what the others keep is gone by then
    return in_flight * ((layers - count) * whole + count * residual), (whole if count == layers else 0) + gradients


def head_memory(arch: Architecture, model: ActorModelConfig, tokens: int, gpu: bool, trained: bool = True) -> int:
    """Hidden states of all tokens twice (gathered, selected) with their gradient, one chunk of logits,
    and the gradient of the head's weight where it is trained."""
    size, rows = BYTES[model.precision], -(-arch.vocab // model.tensor_model_parallel_size)
    return 3 * tokens * arch.hidden * size + logits_chunk(arch, model, tokens, gpu)[1] + trained * rows * arch.hidden * (4 + size)


def logits_chunk(arch: Architecture, model: ActorModelConfig, tokens: int, gpu: bool) -> tuple[int, int]:
    """How many of a rank's tokens have logits at the same time, and the bytes of these, with the fp32 numbers of a block of them."""
    size, rows = BYTES[model.precision], -(-arch.vocab // model.tensor_model_parallel_size)
    together = max(1, min(tokens, LOGITS_CHUNK["gpu" if gpu else "cpu"] // (size * rows)))
    return together, together * rows * size + BLOCK_COPIES * min(together * rows * 4, LOGITS_BLOCK)


def engine_memory(arch: Architecture, config: Config, gpu: bool) -> EngineMemory:
    """Memory of a device of an engine with rollout.tensor_parallel_size devices.

    The embedded engine may fill all its slots up to runner.seq_length. SGLang queues what does not fit, so on a GPU it must only hold one
    whole sample; on CPU its server is told how many tokens to hold.
    """
    rollout, tp, context = config.rollout, config.rollout.tensor_parallel_size, config.runner.seq_length
    size = BYTES[rollout.precision or config.actor.model.precision]
    vocabulary = (1 if arch.tied else 2) * arch.vocab * arch.hidden
    weights = (arch.n_layers * layer_parameters(arch, 1) + vocabulary + arch.hidden) * size // tp
    kv_token = 2 * arch.n_layers * max(1, arch.n_kv_heads // tp) * arch.head_dim * size
    if rollout.rollout_backend == "embedded":
        tokens = rollout.max_running_requests * context
    else:
        tokens = context if gpu else int(rollout.sglang.get("max_total_tokens", kv_tokens_on_cpu(rollout.max_running_requests, context)))
    return EngineMemory(weights, kv_token, tokens)
