"""The shape of a model, read from its Hugging Face config.json. The only module that knows how the model families differ."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf.config.model import experts_of, read_config
from rlinf.errors import UserError


@dataclass(frozen=True)
class Family:
    """How families of decoders whose tensors have the same names differ: a bias on q, k and v; a norm of each head of q and k; a mixture of
    experts in place of the MLP of each layer."""

    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False


SIZES = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
OTHER_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")  # may be left out
EXPERT_SIZES = ("moe_intermediate_size", "num_experts_per_tok")
FAMILIES = {  # by model_type of config.json
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "llama": Family(),
    "qwen3_moe": Family(qk_norm=True, experts=True),
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder.

    ffn: units of an MLP; of one expert, where a layer has several. experts: MLPs of a layer among which each token chooses top_k; 0 = one
    MLP for all tokens. normalized_routing: whether the weights of a token's experts add up to 1.
    """

    family: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    experts: int = 0
    top_k: int = 0
    normalized_routing: bool = True

    @property
    def mlps(self) -> int:
        """MLPs in a layer."""
        return self.experts or 1

    @property
    def active_mlps(self) -> int:
        """MLPs of a layer that a token goes through."""
        return self.top_k or 1


def _check_types(hf: dict[str, Any], family: Family, where: str | Path) -> None:
    """Raise UserError for the first value that is not a size, number or object where one is expected."""
    again = "copy the file from the model's source again"
    needed = (*SIZES, *EXPERT_SIZES) if family.experts else SIZES
    for name in (*needed, *OTHER_SIZES, "num_experts", "num_local_experts"):
        value = hf.get(name)
        if value is None and name in needed:
            raise UserError(f"{where}: {name} is missing; {again}")
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{where}: {name} is {json.dumps(value)}, which is no whole number above 0; {again}")
    for name in ("rms_norm_eps", "rope_theta"):
        value = hf.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise UserError(f"{where}: {name} is {json.dumps(value)}, which is no number above 0; {again}")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(name) or {}, dict):
            raise UserError(f'{where}: {name} is {json.dumps(hf[name])}, which is no object such as {{"rope_type": ...}}; {again}')


def open_architecture(model_dir: str | Path) -> Architecture:
    """The shape of the model in a Hugging Face folder. Raises UserError that names its config.json, as read_architecture()."""
    file = Path(model_dir, "config.json")
    return read_architecture(read_config(file), file)


def read_architecture(hf: dict[str, Any], where: str | Path = "config.json") -> Architecture:
    """Parse the content of a config.json. where: its path, for messages. Raises UserError when it is not one, or is of a model that this
    platform does not train."""
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{where}: unknown architecture: model_type {family!r}; supported are {', '.join(FAMILIES)}")
    kind_of = FAMILIES[family]
    _check_types(hf, kind_of, where)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: rope type {kind!r} is not supported; only 'default' is")
    # without the switch that Qwen has, a window that is given is used
    if hf.get("use_sliding_window", bool(hf.get("sliding_window")) and not family.startswith("qwen")):
        raise UserError(f"{where}: use_sliding_window or sliding_window is set; sliding-window attention is not supported")
    if hf.get("mlp_bias") or (family != "qwen2" and hf.get("attention_bias")):
        raise UserError(f"{where}: mlp_bias / attention_bias are not supported for this family")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {hf['hidden_act']!r} is not supported; only 'silu' is")
    heads = hf["num_attention_heads"]
    return Architecture(
        family=family,
        n_layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        n_heads=heads,
        n_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn=hf["moe_intermediate_size" if kind_of.experts else "intermediate_size"],
        vocab=hf["vocab_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(hf.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        max_positions=hf.get("max_position_embeddings", 0),
        tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=kind_of.qkv_bias,
        qk_norm=kind_of.qk_norm,
        **(_mixture(hf, where) if kind_of.experts else {}),
    )


def _mixture(hf: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """What a config.json says of the experts. Raises UserError where only some layers have any, or there are fewer than a token uses."""
    experts, top_k = experts_of(hf), hf["num_experts_per_tok"]
    if not experts:
        raise UserError(f"{where}: num_experts is missing; copy the file from the model's source again")
    if top_k > experts:
        raise UserError(f"{where}: num_experts_per_tok is {top_k}, but there are only {experts} experts")
    if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"{where}: by mlp_only_layers or decoder_sparse_step some layers have no experts; that is not supported")
    return {"experts": experts, "top_k": top_k, "normalized_routing": bool(hf.get("norm_topk_prob", False))}
