"""A tiny random model in a Hugging Face folder, with a real (byte-level) tokenizer: what tests use instead of a download."""

from __future__ import annotations

import json
from pathlib import Path

FAMILIES = ("qwen2", "qwen2-tied", "qwen3", "llama", "qwen3-moe")


def make_tiny_model(
    folder: Path,
    family: str = "qwen2",
    *,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write config.json, model.safetensors and a byte-level tokenizer (vocabulary 320, `<|end|>` = 256) into `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained(str(folder))
    shape = dict(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=256,
        tie_word_embeddings=family == "qwen2-tied",
    )
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    }[family]
    if family.startswith("qwen3"):
        shape["head_dim"] = 24  # not hidden / heads: the family allows it
    if family == "qwen3-moe":
        shape |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "norm_topk_prob": True}
    torch.manual_seed(seed)
    model = model_class(config_class(**shape))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.08)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.1)
            else:
                tensor.uniform_(0.7, 1.3)
    model.to(getattr(torch, dtype)).save_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
