"""Tiny random models of every supported family as Hugging Face folders, for proofs. Their sizes are awkward on purpose."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models

from rlinf.weights.architecture import read_architecture
from rlinf.weights.mapping import hf_shapes

VOCAB = 131  # divisible by no tensor-parallel size: the padded rows must never show
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "dtype": "float32",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12},  # not hidden / heads
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4, "rope_theta": 500000.0},
}
FAMILIES["qwen3-moe"] = FAMILIES["qwen3"] | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 24, "norm_topk_prob": True, "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES |= {f"{name}-tied": FAMILIES[name] | {"tie_word_embeddings": True} for name in ("qwen2", "qwen3", "llama")}


def write_tiny_model(folder: Path, family: str, seed: int = 0, head: str = "lm") -> Path:
    """Write config.json and model.safetensors of a random model, in which every weight is large enough to matter."""
    return write_model(folder, _COMMON | FAMILIES[family], seed, head)


def write_model(folder: Path, config: dict[str, Any], seed: int = 0, head: str = "lm") -> Path:
    """Write a random model of the shape that a config.json describes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_shapes(read_architecture(config), head).items():
        if name.endswith("bias"):
            tensors[name] = torch.randn(shape, generator=generator) * 0.1
        elif len(shape) == 1:
            tensors[name] = 0.7 + 0.6 * torch.rand(shape, generator=generator)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * 0.12
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tiny_tokenizer(folder: Path) -> Path:
    """A tokenizer of single ASCII characters beside the model; token 0 ends a response, the highest tokens are no text."""
    vocab = {"<|end|>": 0} | {char: i for i, char in enumerate(string.printable[:95], 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}) + "\n")
    return folder
