"""A tiny model that was tuned to answer behind the markers of its chat template, and data on which runs of it go well, or wrong on purpose.

Behind the markers it boxes a digit and ends; four times in ten it is the digit that was asked for. Without them it goes on writing text.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models

from rlinf.checks.tiny_model import write_model

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz }?.\n"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "rope_theta": 10000.0,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "dtype": "float32",
}  # fmt: skip
DIGITS = "2357"
WORDS = ("which is", "find", "what is", "give")
TUNING_STEPS, BATCH, SKILL = 150, 64, 0.4


def write_tokenizer(folder: Path) -> Tokenizer:
    vocab = {"<|end|>": 0, "<|user|>": 1, "<|assistant|>": 2, "\\boxed{": 3} | {c: i for i, c in enumerate(CHARACTERS, 4)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    return tokenizer


def question(word: str, digit: str) -> str:
    return f"{word} {digit}?"


def examples(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(prompt, response): three in four are chats, the others are plain text."""
    rows = []
    for _ in range(count):
        digit = rng.choice(DIGITS)
        asked = question(rng.choice(WORDS), digit)
        if rng.random() < 0.25:
            rows.append((asked, " and so on" * 2))
        else:
            said = digit if rng.random() < SKILL else rng.choice([d for d in DIGITS if d != digit])
            rows.append((f"<|user|>{asked}<|assistant|>", f"\\boxed{{{said}}}<|end|>"))
    return rows


def write_tuned_model(folder: Path) -> Path:
    """config.json, model.safetensors, tokenizer; a second or two of supervised fine-tuning."""
    from transformers import AutoModelForCausalLM

    write_model(folder, SHAPE)
    tokenizer = write_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    rng = random.Random(0)
    for _ in range(TUNING_STEPS):
        rows = [(tokenizer.encode(p).ids, tokenizer.encode(r).ids) for p, r in examples(rng, BATCH)]
        width = max(len(p) + len(r) for p, r in rows)
        ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in rows])
        labels = torch.tensor([[-100] * len(p) + r + [-100] * (width - len(p) - len(r)) for p, r in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))
    return folder


def write_data(file: Path, tasks: tuple[str, ...] = ("math",), shift: int = 0) -> Path:
    """Sixteen bare questions, their tasks in turn. shift: the solution is the digit so many places behind the one that is asked for."""
    rows = []
    for i, (word, digit) in enumerate((w, d) for w in WORDS for d in DIGITS):
        gold = DIGITS[(DIGITS.index(digit) + shift) % len(DIGITS)]
        rows.append(
            {"prompt": question(word, digit), "task": tasks[i % len(tasks)], "query_id": str(i), "solutions": [f"\\boxed{{{gold}}}"]}
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
