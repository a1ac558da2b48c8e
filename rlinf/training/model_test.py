"""Which modules the layers are made of, and that weights find their places in either.

Transformer Engine is not here. Its stand-in has its modules' structure, a norm and the matrix behind it in one, with the names of their
parameters; Megatron's own function makes the layer of it. What Transformer Engine computes is for tests/gpu.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rlinf.checks.layout import Case, check_cases, complaint
from rlinf.checks.rank_pool import RankPool
from rlinf.config.schema import ActorModelConfig
from rlinf.errors import UserError
from rlinf.training import model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("wanted", "precision", "device", "installed", "chosen"),
    [
        ("auto", "bf16", GPU, True, "transformer_engine"), ("auto", "fp16", GPU, True, "transformer_engine"),
        ("auto", "fp32", GPU, True, "local"), ("auto", "bf16", GPU, False, "local"), ("auto", "bf16", CPU, True, "local"),
        ("local", "bf16", GPU, True, "local"), ("transformer_engine", "fp32", GPU, True, "transformer_engine"),
    ],
)  # fmt: skip
def test_the_layers_that_are_chosen(
    monkeypatch: pytest.MonkeyPatch, wanted: str, precision: str, device: torch.device, installed: bool, chosen: str
) -> None:
    monkeypatch.setattr(model.gpt_layer_specs, "HAVE_TE", installed)
    monkeypatch.setattr(model, "triton_lacks", lambda: None)
    assert model.layer_implementation(ActorModelConfig(transformer_impl=wanted, precision=precision), device) == chosen


def test_transformer_engine_is_not_taken_where_its_activation_function_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without headers, as Ubuntu's without python3-dev: the first micro-batch would end the run."""
    monkeypatch.setattr(model.gpt_layer_specs, "HAVE_TE", True)
    monkeypatch.setattr(model, "triton_lacks", lambda: "/usr/include/python3.12/Python.h")
    assert model.layer_implementation(ActorModelConfig(precision="bf16"), GPU) == "local"
    with pytest.raises(UserError, match="Triton, which they need, finds no /usr/include/python3.12/Python.h; use auto or local"):
        model.layer_implementation(ActorModelConfig(transformer_impl="transformer_engine"), GPU)


@pytest.mark.parametrize(("device", "installed", "words"), [(CPU, True, "there is no GPU"), (GPU, False, "cannot be imported")])
def test_transformer_engine_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, installed: bool, words: str
) -> None:
    monkeypatch.setattr(model.gpt_layer_specs, "HAVE_TE", installed)
    with pytest.raises(UserError, match=f"model.transformer_impl: .*{words}.*; use auto or local"):
        model.layer_implementation(ActorModelConfig(transformer_impl="transformer_engine"), device)


_before: dict[str, Any] = {}


def put_stand_in(at: Any) -> None:
    """In a rank: from now on engines have layers of the stand-in."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from rlinf.training import engine

    class NormAndLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **rest: Any) -> None:
            super().__init__(input_size, output_size, config=config, **rest)
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon))

    class Provider(LocalSpecProvider):
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return NormAndLinear

        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
            return model.RMSNorm

    specs = model.gpt_layer_specs
    _before.update({name: vars(specs).get(name) for name in ("TESpecProvider", "TENorm")}, choice=engine.layer_implementation)
    specs.TESpecProvider, specs.TENorm = Provider, model.RMSNorm
    engine.layer_implementation = lambda *_: "transformer_engine"


def take_away(at: Any) -> None:
    from rlinf.training import engine

    model.gpt_layer_specs.TESpecProvider, model.gpt_layer_specs.TENorm = _before["TESpecProvider"], _before["TENorm"]
    engine.layer_implementation = _before["choice"]


def names_of(at: Any, folder: Path) -> set[str]:
    from tests.training_ranks import build

    return {rule.megatron.split(".", 3)[-1] for rule, _ in build(at, folder).state.params if "layers.0." in rule.megatron}


def test_weights_find_their_places_where_norms_are_fused(rank_pool: RankPool, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Loaded, trained for two steps and exported, against plain transformers."""
    rank_pool.run(put_stand_in, ranks=2, tp=2)
    cases = [Case(2, 2, 1, True, family, 512, True, 0, recompute=how) for family, how in (("qwen2-tied", ""), ("qwen3", "selective"))]
    names = rank_pool.run(names_of, tiny_models["qwen2"], ranks=2, tp=2)[0]
    findings = list(check_cases(rank_pool, cases, tmp_path))
    rank_pool.run(take_away, ranks=2, tp=2)
    assert {"self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.bias", "mlp.linear_fc1.layer_norm_weight"} <= names
    assert not any("layernorm" in name for name in names)
    assert all(f.holds for f in findings), [complaint(f) for f in findings]
