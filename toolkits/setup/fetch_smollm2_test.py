"""From GGUF to a Hugging Face folder: every tensor back where it came from, whole or not at all."""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers

import toolkits.setup.fetch_smollm2 as fetcher
from rlinf.data.tokenizer import load_tokenizer
from rlinf.errors import UserError

LAYERS, HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 2, 16, 4, 2, 24, 261


def to_gguf_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: the two halves of each head become interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tiny_weights() -> dict[str, np.ndarray]:
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        inside = {
            "input_layernorm": (HIDDEN,), "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN), "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in inside.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, weights: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "12"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 258)
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    back = {hf: gguf for gguf, hf in fetcher.TOP_LEVEL.items()}
    parts = {hf: gguf for gguf, hf in fetcher.IN_BLOCK.items()}
    for name, weight in weights.items():
        if name in back:
            writer.add_tensor(back[name], weight)
            continue
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
        writer.add_tensor(f"blk.{layer}.{parts[part]}.weight", to_gguf_rows(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    monkeypatch.setattr(fetcher, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_every_tensor_comes_back_under_its_name(tmp_path: Path, gguf: Path) -> None:
    folder = fetcher.fetch(tmp_path / "cache", gguf)
    expected, got = tiny_weights(), load_file(str(folder / "model.safetensors"))
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], torch.from_numpy(weight).bfloat16()), name


def test_the_folder_is_a_llama_model_with_the_right_end_token(tmp_path: Path, gguf: Path) -> None:
    folder = fetcher.fetch(tmp_path / "cache", gguf)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["num_key_value_heads"], config["head_dim"]) == ("llama", True, 2, 4)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0 and config["rms_norm_eps"] == 1e-5
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((2,), None)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == VOCABULARY
    assert tokenizer.encode("ab12<|im_end|>")[-1] == 2 and tokenizer.decode(tokenizer.encode("ab12<|im_end|>")) == "ab12"
    assert len(tokenizer.encode("12")) == 2  # digits stay single, whatever the merges say


def test_a_second_call_does_nothing_and_two_at_once_make_one(tmp_path: Path, gguf: Path) -> None:
    cache = tmp_path / "cache"
    both = [threading.Thread(target=fetcher.fetch, args=(cache, gguf)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    folder = cache / "models" / fetcher.MODEL_NAME
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetcher.fetch(cache) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [p.name for p in (cache / "models").iterdir() if p.is_dir()] == [fetcher.MODEL_NAME]


def test_a_damaged_file_is_refused_and_leaves_nothing(tmp_path: Path, gguf: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:-1])
    with pytest.raises(UserError, match="sha256"):
        fetcher.fetch(tmp_path / "cache", gguf)
    with pytest.raises(UserError, match="no such file"):
        fetcher.fetch(tmp_path / "cache", tmp_path / "nowhere.gguf")
    assert not any(p.is_dir() for p in (tmp_path / "cache" / "models").iterdir())


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "cache" / "models" / fetcher.MODEL_NAME).mkdir(parents=True)
    with pytest.raises(UserError, match="move it away"):
        fetcher.fetch(tmp_path / "cache", gguf)
