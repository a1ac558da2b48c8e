"""A broken config.json is one message that names the file and the value."""

from pathlib import Path

import pytest

from rlinf.errors import UserError
from rlinf.weights.architecture import open_architecture, read_architecture

QWEN = {
    "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 320,
}  # fmt: skip


def test_a_whole_one_is_read() -> None:
    arch = read_architecture(QWEN | {"num_key_value_heads": None, "rope_scaling": None, "rope_theta": 5000})
    assert (arch.n_layers, arch.n_kv_heads, arch.head_dim, arch.rope_theta) == (2, 4, 16, 5000.0)


MOE = QWEN | {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@pytest.mark.parametrize("count", ["num_experts", "num_local_experts"])
def test_experts_are_read_under_both_names(count: str) -> None:
    arch = read_architecture({k: v for k, v in MOE.items() if k != "num_experts"} | {count: 8})
    assert (arch.experts, arch.top_k, arch.ffn, arch.normalized_routing, arch.mlps, arch.active_mlps) == (8, 2, 48, True, 8, 2)
    assert not read_architecture({k: v for k, v in MOE.items() if k != "norm_topk_prob"}).normalized_routing  # as in transformers
    assert (read_architecture(QWEN).mlps, read_architecture(QWEN).active_mlps) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts": None}, "num_experts is missing; copy the file"),
        ({"num_experts": "8"}, 'num_experts is "8", which is no whole number above 0'),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing; copy the file"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are only 8 experts"),
        ({"mlp_only_layers": [0]}, "by mlp_only_layers or decoder_sparse_step some layers have no experts"),
        ({"decoder_sparse_step": 2}, "by mlp_only_layers or decoder_sparse_step some layers have no experts"),
    ],
)
def test_what_is_wrong_with_experts_is_named(changes: dict, expected: str) -> None:
    with pytest.raises(UserError) as error:
        read_architecture(MOE | changes, "model/config.json")
    assert str(error.value).startswith(f"model/config.json: {expected}")


def test_a_folder_whose_config_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "qwen2",')
    with pytest.raises(UserError, match=f"{file}:1: not valid JSON"):
        open_architecture(tmp_path)
    file.write_text('{"model_type": "mistral"}')
    with pytest.raises(UserError, match=f"{file}: unknown architecture"):
        open_architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is missing; copy the file"),
        ({"hidden_size": "64"}, 'hidden_size is "64", which is no whole number above 0; copy the file'),
        ({"vocab_size": True}, "vocab_size is true, which is no whole number above 0"),
        ({"num_key_value_heads": 1.5}, "num_key_value_heads is 1.5, which is no whole number above 0"),
        ({"head_dim": -8}, "head_dim is -8, which is no whole number above 0"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6", which is no number above 0'),
        ({"rope_theta": [1]}, "rope_theta is [1], which is no number above 0"),
        ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn", which is no object such as {"rope_type": ...}; copy the file'),
        ({"model_type": ["qwen2"]}, "unknown architecture: model_type ['qwen2']"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(changes: dict, expected: str) -> None:
    with pytest.raises(UserError) as error:
        read_architecture(QWEN | changes, "model/config.json")
    assert str(error.value).startswith(f"model/config.json: {expected}")
