"""What a Hugging Face config.json says about a model of the families that the embedded engine runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf.errors import UserError

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of a dense decoder with rotary positions, RMS norms and SwiGLU."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} key-value heads")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the Hugging Face layout."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h), "model.norm.weight": (h,)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, h)
        for i in range(self.layers):
            p = f"model.layers.{i}."
            shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
            shapes |= {p + f"self_attn.{name}_proj.weight": (rows, h) for name, rows in (("q", q), ("k", kv), ("v", kv))}
            shapes |= {p + "self_attn.o_proj.weight": (h, q), p + "mlp.down_proj.weight": (h, self.intermediate)}
            shapes |= {p + f"mlp.{name}_proj.weight": (self.intermediate, h) for name in ("gate", "up")}
            if self.qkv_bias:
                shapes |= {p + f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
            if self.output_bias:
                shapes[p + "self_attn.o_proj.bias"] = (h,)
            if self.qk_norm:
                shapes |= {p + f"self_attn.{name}_norm.weight": (self.head_dim,) for name in ("q", "k")}
        return shapes


def read_shape(model_dir: str) -> ModelShape:
    """Read <model_dir>/config.json. Raises UserError for a missing file, an unknown architecture or a feature that is not supported."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; rollout.model_dir must be a local Hugging Face model folder")
    config = json.loads(path.read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture} is not supported by the embedded engine; supported are {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(path, config)
    heads = config["num_attention_heads"]
    attention_bias = bool(config.get("attention_bias", False))
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=float(config.get("rope_theta") or _rope(config).get("rope_theta") or 10000.0),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=True if architecture == "Qwen2ForCausalLM" else attention_bias,
        output_bias=attention_bias and architecture != "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
    )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes rope_parameters, older versions rope_scaling (or nothing)."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = {
        f"rope scaling `{kind}`": kind != "default",
        f"hidden_act `{config.get('hidden_act')}`": config.get("hidden_act", "silu") != "silu",
        "sliding-window attention": bool(config.get("use_sliding_window", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }
    for feature, present in found.items():
        if present:
            raise UserError(f"{path}: {feature} is not supported by the embedded engine; use another model or the SGLang engine")
