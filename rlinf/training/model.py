"""The decoder as a megatron-core GPTModel: configuration from the architecture, the layer spec, and two heads: `lm` returns
log-probabilities of response tokens instead of logits, `scalar` one number for each of them (the critic's values, token rewards).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from rlinf.config.schema import ActorModelConfig
from rlinf.errors import UserError
from rlinf.hardware import triton_lacks
from rlinf.kernels.rowwise import rms_norm, swiglu
from rlinf.training.attention import PackedAttention, rope_tables
from rlinf.training.context import gather_tokens, share_of
from rlinf.training.experts import ExpertsMLP, count_load
from rlinf.training.logprobs import target_logprobs
from rlinf.training.packed_batch import PackedBatch
from rlinf.weights.architecture import Architecture
from rlinf.weights.dtypes import DTYPES
from rlinf.weights.mapping import padded_vocab


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that marks its weight for the gradient sum over tensor-parallel ranks under sequence parallelism."""

    eps: float

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # the name by which Megatron looks for the mark

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(MLP):
    """Megatron's with its local linear layers, and our activation. A class, not a spec: of a spec that it does not know Megatron warns."""

    def __init__(self, config: TransformerConfig) -> None:
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        tp = mpu.get_tensor_model_parallel_group()
        super().__init__(config, linear, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp)

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        gate_up, _no_bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))


def transformer_config(arch: Architecture, model: ActorModelConfig, tp: int, pp: int, cp: int = 1) -> TransformerConfig:
    """Megatron's configuration for this architecture and the YAML's actor.model section."""
    dtype = DTYPES[model.precision]
    return TransformerConfig(
        num_layers=arch.n_layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.n_heads,
        num_query_groups=arch.n_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        sequence_parallel=model.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # unused here, but the default refuses variable_seq_lengths
        calculate_per_token_loss=True,  # losses carry their global denominators; nothing divides them again
        recompute_granularity=model.recompute_granularity,
        recompute_method=model.recompute_method,
        recompute_num_layers=model.recompute_num_layers,
        use_cpu_initialization=True,
        perform_initialization=False,
        persist_layer_norm=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=False,
        batch_p2p_comm=False,
    )


def layer_implementation(model: ActorModelConfig, device: torch.device) -> str:
    """`transformer_engine` or `local`, by actor.model.transformer_impl.

    auto: the former in 16 bits on a GPU where Megatron can import it; its fp32 matrix products are TF32, so fp32 stays with the latter. So
    does what cannot be compiled: Megatron has the activation function between Transformer Engine's matrices from torch.compile.
    Raises UserError when Transformer Engine is asked for by name and cannot be used.
    """
    obstacle = None
    if device.type != "cuda":
        obstacle = "there is no GPU"
    elif not gpt_layer_specs.HAVE_TE:
        obstacle = "it cannot be imported: `python -c 'import transformer_engine.pytorch'` says why"
    elif (lacking := triton_lacks()) is not None:
        obstacle = f"Triton, which they need, finds no {lacking}"
    if model.transformer_impl == "transformer_engine" and obstacle is not None:
        raise UserError(f"model.transformer_impl: Transformer Engine's layers are asked for, but {obstacle}; use auto or local")
    if model.transformer_impl == "auto":
        return "transformer_engine" if obstacle is None and model.precision != "fp32" else "local"
    return model.transformer_impl


def layer_spec(config: TransformerConfig, implementation: str, arch: Architecture) -> TransformerBlockSubmodules:
    """Megatron's layers, of Transformer Engine's matrices and norms or of its own with our norm; our packed attention and experts in
    both."""
    if implementation == "transformer_engine":
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        layer, norm = spec.submodules, gpt_layer_specs.TENorm
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        layer, norm = spec.submodules, RMSNorm
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        layer.mlp = GatedMLP
        if config.qk_layernorm:
            layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = RMSNorm
    if arch.experts:
        # a class of its own for the architecture: Megatron makes a module from its class and the configuration alone
        layer.mlp, layer.pre_mlp_layernorm = type("ExpertsMLP", (ExpertsMLP,), {"arch": arch}), norm
    layer.self_attention.submodules.core_attention = PackedAttention
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)


class PackedModel(GPTModel):
    """forward(PackedBatch) -> hidden states, or on the last pipeline stage what the head makes of the rows that predict response tokens:
    `lm` (logprob_N, entropy_N), `scalar` value_N.
    """

    def __init__(self, arch: Architecture, config: TransformerConfig, head: str, implementation: str) -> None:
        self.arch, self.head, self.fused_norms = arch, head, implementation == "transformer_engine"
        super().__init__(
            config=config,
            transformer_layer_spec=layer_spec(config, implementation, arch),
            vocab_size=padded_vocab(arch, config.tensor_model_parallel_size),
            max_sequence_length=arch.max_positions,
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied and head == "lm",
            position_embedding_type="none",  # PackedAttention rotates by the batch's positions
        )
        if self.post_process and head == "scalar":
            self.output_layer: Any = None  # GPTModel always makes one
            self.score = torch.nn.Parameter(torch.empty(1, arch.hidden, dtype=config.params_dtype))
        self.mixtures = [module for module in self.decoder.modules() if isinstance(module, ExpertsMLP)]

    @property
    def layers(self) -> range:
        """The layers of this pipeline stage, counted over the whole model."""
        first = get_transformer_layer_offset(self.config)
        return range(first, first + len(self.decoder.layers))

    def local_name(self, megatron: str) -> str:
        """A parameter's name on this stage, from its name in the whole model."""
        if not megatron.startswith("decoder.layers."):
            return megatron
        _, _, layer, rest = megatron.split(".", 3)
        return f"decoder.layers.{int(layer) - self.layers.start}.{rest}"

    def forward_packed(self, batch: PackedBatch) -> Any:
        if not hasattr(batch, "share"):
            batch.share = share_of(batch, mpu.get_context_parallel_rank(), self.config.context_parallel_size)
            batch.rope = rope_tables(batch.share.positions, self.arch.head_dim, self.arch.rope_theta, self.config.params_dtype)
        with count_load(self.mixtures, batch.share.predict_rows):
            return self(batch.share.token_ids[None], batch.share.positions[None], None, packed_seq_params=batch)

    def take_load(self) -> Tensor:
        """The counts of each layer's experts in the whole model since the last call [layers, experts]; zeros for other stages' layers."""
        load_LE = torch.zeros(self.arch.n_layers, self.arch.experts, dtype=torch.int64)
        for layer, mixture in zip(self.layers, self.mixtures):
            load_LE[layer] = mixture.load_E.cpu()
            mixture.load_E.zero_()
        return load_LE

    def _postprocess(self, hidden_states: Tensor, *_: Any, packed_seq_params: PackedBatch, **__: Any) -> Any:
        if not self.post_process:
            return hidden_states
        return (self._logprobs if self.head == "lm" else self._values)(hidden_states, packed_seq_params)

    def _logprobs(self, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        share = batch.share
        found = target_logprobs(
            hidden.squeeze(1).index_select(0, share.predict_rows),
            weight,
            batch.targets if share.tokens is None else batch.targets[share.tokens],
            temperature=batch.temperature,
            vocab=self.arch.vocab,
            group=mpu.get_tensor_model_parallel_group(),
        )
        if share.tokens is None:
            return found
        logprobs_N, entropy_N = self._all_tokens(torch.stack(found), batch)
        return logprobs_N, entropy_N

    def _values(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """fp32. Every tensor-parallel rank computes the whole head on all rows and so has the complete gradient of the head and of the
        hidden states: nothing is summed over these ranks.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        values = hidden.squeeze(1).index_select(0, batch.share.predict_rows).float() @ self.score[0].float()
        return self._all_tokens(values, batch)

    def _all_tokens(self, values: Tensor, batch: PackedBatch) -> Tensor:
        """The values of all response tokens, from those of this rank's rows."""
        mine = batch.share.tokens
        return values if mine is None else gather_tokens(values, mine, len(batch.targets), mpu.get_context_parallel_group())


def with_value_head(tensors: Mapping[str, Tensor], hidden: int, seed: int) -> Mapping[str, Tensor]:
    """`tensors`, and a value head where they have none: normal with standard deviation 1 / (hidden + 1), so that values start near 0.

    The same on every rank and in every layout.
    """
    if "score.weight" in tensors:
        if (shape := tuple(tensors["score.weight"].shape)) != (1, hidden):
            raise UserError(f"critic.model_dir: its score.weight is {shape}; a critic has one number a token, (1, {hidden})")
        return tensors
    weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed)) / (hidden + 1)
    return ChainMap({"score.weight": weight}, tensors)  # type: ignore[arg-type]  # it is only read


def with_scoring_head(tensors: Mapping[str, Tensor], hidden: int) -> tuple[Mapping[str, Tensor], float]:
    """`tensors` of a classification model with its head as one row, and the bias of that row.

    With one label a token's score is its logit; with two (wrong, right) it is their difference,
    whose sigmoid is the probability of the second.
    """
    if "score.weight" not in tensors:
        raise UserError(
            "token_reward.model_dir: the model has no score.weight; it must be a …ForTokenClassification or …ForSequenceClassification"
        )
    weight = tensors["score.weight"].float()
    bias = tensors["score.bias"].float() if "score.bias" in tensors else torch.zeros(len(weight))
    if tuple(weight.shape) not in ((1, hidden), (2, hidden)):
        raise UserError(
            f"token_reward.model_dir: its score.weight is {tuple(weight.shape)}; "
            f"a token reward model has one label or two, of {hidden} numbers"
        )
    if len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    return ChainMap({"score.weight": weight}, tensors), float(bias[0])  # type: ignore[arg-type]  # it is only read
