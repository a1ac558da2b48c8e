"""Hugging Face <-> Megatron-core: names and layouts, both directions, in one table of rules.

A rule says which HF tensors make one Megatron parameter and how that parameter is laid out and sharded over tensor-parallel ranks:

    replicated   the same on every rank
    row          sharded along dim 1
    vocab        sharded along dim 0 after padding the vocabulary with zero rows to a multiple of the TP size
    qkv          q, k, v interleaved by query group, then sharded along dim 0 by group
    gate_up      each rank holds [its part of gate; its part of up]
    stacked      one after another, the same on every rank
    experts      [experts, rows, columns]; each rank has a part of the experts, whole: its gate above its up, or its down

Everything that is saved, published to a rollout engine or resharded goes through this table, so a tensor has one name on disk and on
the wire whatever the layout: its HF name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf.weights.architecture import Architecture

FUSED = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}  # matrix -> the norm in front of it


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (layer index global) and the HF tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    layout: str

    @property
    def sharded(self) -> bool:
        """Whether every tensor-parallel rank holds another part of it."""
        return self.layout not in ("replicated", "stacked")


def fused_norms_of(arch: Architecture) -> dict[str, str]:
    """matrix -> the norm in front of it, where Transformer Engine computes both in one module. Experts have no such module: a token is
    routed by what the norm gives."""
    return {matrix: norm for matrix, norm in FUSED.items() if not (arch.experts and matrix.startswith("mlp."))}


def layer_rules(arch: Architecture, layer: int, fused_norms: bool = False) -> Iterator[Rule]:
    """The parameters of decoder layer `layer` (counted over the whole model), in the order of the forward pass.

    fused_norms: Transformer Engine computes a norm and the matrix behind it in one module, which holds the weights of both.
    """
    mcore, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    fused = {norm: f"{matrix}.layer_norm_weight" for matrix, norm in fused_norms_of(arch).items()} if fused_norms else {}
    norms = [fused.get(norm, f"{norm}.weight") for norm in FUSED.values()]
    yield Rule(mcore + norms[0], (hf + "input_layernorm.weight",), "replicated")
    for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
        yield Rule(mcore + f"self_attention.linear_qkv.{kind}", tuple(hf + f"self_attn.{p}_proj.{kind}" for p in "qkv"), "qkv")
    if arch.qk_norm:
        for p in "qk":
            yield Rule(mcore + f"self_attention.{p}_layernorm.weight", (hf + f"self_attn.{p}_norm.weight",), "replicated")
    yield Rule(mcore + "self_attention.linear_proj.weight", (hf + "self_attn.o_proj.weight",), "row")
    yield Rule(mcore + norms[1], (hf + "post_attention_layernorm.weight",), "replicated")
    if arch.experts:
        yield Rule(mcore + "mlp.router", (hf + "mlp.gate.weight",), "replicated")
        of = [f"{hf}mlp.experts.{e}." for e in range(arch.experts)]
        yield Rule(mcore + "mlp.gate_up", tuple(f"{e}{p}_proj.weight" for e in of for p in ("gate", "up")), "experts")
        yield Rule(mcore + "mlp.down", tuple(f"{e}down_proj.weight" for e in of), "experts")
        return
    yield Rule(mcore + "mlp.linear_fc1.weight", (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"), "gate_up")
    yield Rule(mcore + "mlp.linear_fc2.weight", (hf + "mlp.down_proj.weight",), "row")


def model_rules(
    arch: Architecture, layers: range, first_stage: bool, last_stage: bool, head: str = "lm", fused_norms: bool = False
) -> list[Rule]:
    """The parameters of one pipeline stage. With tied embeddings the last of several stages holds a copy of the embedding.

    head `scalar`: one number a row in place of the vocabulary, named as in transformers' sequence classification models.
    """
    rules = []
    if first_stage:
        rules.append(Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"))
    for layer in layers:
        rules += layer_rules(arch, layer, fused_norms)
    if last_stage:
        rules.append(Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"))
        if head == "scalar":
            rules.append(Rule("score", ("score.weight",), "replicated"))
        elif not arch.tied:
            rules.append(Rule("output_layer.weight", ("lm_head.weight",), "vocab"))
        elif not first_stage:
            rules.append(Rule("output_layer.weight", ("model.embed_tokens.weight",), "vocab"))
    return rules


def adapter_rules(arch: Architecture, layers: range, targets: Collection[str]) -> list[Rule]:
    """The adapters of the matrices `targets` (Megatron's names) of one pipeline stage: for each of them lora_A, whose columns are the
    matrix's inputs, then lora_B, whose rows are its outputs. Every Hugging Face matrix has an A and a B of its own, named as in PEFT."""
    rules = []
    for matrix in (rule for layer in layers for rule in layer_rules(arch, layer)):
        *path, module, kind = matrix.megatron.split(".")
        if module in targets and kind == "weight":
            a, b = (tuple(name.removesuffix("weight") + f"lora_{x}.weight" for name in matrix.hf) for x in "AB")
            by_input = matrix.layout == "row"
            where = ".".join([*path, module])
            rules += [
                Rule(f"{where}.adapter.a", a, "row" if by_input else "stacked"),
                Rule(f"{where}.adapter.b", b, "replicated" if by_input else matrix.layout),
            ]
    return rules


def padded_vocab(arch: Architecture, tp: int) -> int:
    """Rows of the embedding over all ranks; the rows beyond arch.vocab are zero and never predicted."""
    return -(-arch.vocab // tp) * tp


def to_megatron(rule: Rule, hf: Sequence[Tensor], arch: Architecture, tp: int, rank: int) -> Tensor:
    """The shard of rank `rank` of the parameter, from its whole HF tensors (a new contiguous tensor)."""
    if rule.layout == "replicated":
        return hf[0].clone()
    if rule.layout == "row":
        return hf[0].chunk(tp, 1)[rank].contiguous()
    if rule.layout == "gate_up":
        return torch.cat([t.chunk(tp, 0)[rank] for t in hf])
    if rule.layout == "stacked":
        return torch.cat(list(hf))
    if rule.layout == "experts":
        mine = hf[rank * len(hf) // tp : (rank + 1) * len(hf) // tp]
        return torch.cat(list(mine)).view(arch.experts // tp, -1, hf[0].shape[1])
    if rule.layout == "vocab":
        rows = padded_vocab(arch, tp) // tp
        shard = hf[0][rank * rows : (rank + 1) * rows]
        return torch.cat([shard, shard.new_zeros(rows - len(shard), *shard.shape[1:])]) if len(shard) < rows else shard.clone()
    groups, dim = arch.n_kv_heads, arch.head_dim
    tail = hf[0].shape[1:]
    q, k, v = (t.reshape(groups, -1, *tail) for t in hf)
    first, last = rank * groups // tp, (rank + 1) * groups // tp
    fused = torch.cat([q, k, v], 1)[first:last]
    return fused.reshape((last - first) * (arch.n_heads // groups + 2) * dim, *tail).contiguous()


def to_hf(rule: Rule, shards: Sequence[Tensor], arch: Architecture) -> list[tuple[str, Tensor]]:
    """The whole HF tensors (name, tensor) of a parameter from its shards in the order of the tensor-parallel ranks."""
    if rule.layout == "replicated":
        return [(rule.hf[0], shards[0])]
    if rule.layout == "row":
        return [(rule.hf[0], torch.cat(list(shards), 1) if len(shards) > 1 else shards[0])]
    if rule.layout == "stacked":
        return list(zip(rule.hf, shards[0].chunk(len(rule.hf))))
    if rule.layout == "experts":
        parts = len(rule.hf) // arch.experts
        return list(zip(rule.hf, (part for shard in shards for expert in shard.unbind() for part in expert.chunk(parts))))
    if rule.layout == "gate_up":
        halves = [s.chunk(2, 0) for s in shards]
        return [(name, torch.cat([h[i] for h in halves]) if len(shards) > 1 else halves[0][i]) for i, name in enumerate(rule.hf)]
    whole = torch.cat(list(shards)) if len(shards) > 1 else shards[0]
    if rule.layout == "vocab":
        return [(rule.hf[0], whole[: arch.vocab])]
    groups, dim = arch.n_kv_heads, arch.head_dim
    tail = whole.shape[1:]
    parts = whole.reshape(groups, -1, *tail).split([arch.n_heads // groups * dim, dim, dim], 1)
    return [(name, part.reshape(-1, *tail)) for name, part in zip(rule.hf, parts)]


def hf_shapes(arch: Architecture, head: str = "lm") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, in the order of the forward pass."""
    h, q, kv, f = arch.hidden, arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim, arch.ffn
    by_suffix = {
        "embed_tokens.weight": (arch.vocab, h), "lm_head.weight": (arch.vocab, h), "norm.weight": (h,), "score.weight": (1, h),
        "q_proj.weight": (q, h), "k_proj.weight": (kv, h), "v_proj.weight": (kv, h), "o_proj.weight": (h, q),
        "q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,),
        "q_norm.weight": (arch.head_dim,), "k_norm.weight": (arch.head_dim,),
        "gate_proj.weight": (f, h), "up_proj.weight": (f, h), "down_proj.weight": (h, f), "gate.weight": (arch.experts, h),
        "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,),
    }  # fmt: skip
    names = [n for rule in model_rules(arch, range(arch.n_layers), True, True, head) for n in rule.hf]
    return {n: by_suffix[".".join(n.split(".")[-2:])] for n in names}


def adapter_shapes(arch: Architecture, rank: int, targets: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter of the model, in the order of the forward pass."""
    of, found = hf_shapes(arch), dict[str, tuple[int, ...]]()
    for name in (name for rule in adapter_rules(arch, range(arch.n_layers), targets) for name in rule.hf):
        rows, columns = of[adapted_matrix(name)]
        found[name] = (rank, columns) if name.endswith("lora_A.weight") else (rows, rank)
    return found


def adapted_matrix(adapter: str) -> str:
    """The Hugging Face name of the matrix that an adapter belongs to."""
    return adapter.replace(".lora_A.", ".").replace(".lora_B.", ".")
