"""One rank of a Megatron role: forward, exact global-mean update, mini-batch early stop. Read `MegatronEngine.update` first."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Parameter

from rlinf.algorithms.aggregation import Denominators
from rlinf.algorithms.objective import MetricSums, ObjectiveSettings, ResponseTokens, early_stop, policy_objective
from rlinf.algorithms.values import ValueSettings, ValueTokens, value_objective
from rlinf.config.schema import ActorModelConfig, LoraConfig, OptimConfig
from rlinf.training.adapters import Adapters
from rlinf.training.context import row_multiple
from rlinf.training.gradients import DataParallel
from rlinf.training.learning_rate import learning_rate
from rlinf.training.model import PackedModel, layer_implementation, transformer_config
from rlinf.training.packed_batch import PackedBatch
from rlinf.training.parallel import Coordinates, merge_over_ranks, sum_over_stages
from rlinf.training.state import OPTIMIZER_STATE, ModelState, OptimizerState
from rlinf.weights.adapters import Noting, with_adapters
from rlinf.weights.architecture import Architecture


@dataclass(frozen=True)
class Update:
    """What one optimizer step did, the same on every rank: metric sums of the mini-batch, pre-clip gradient norm, seconds by part.

    loss_scale: what the losses were multiplied by; None = they were not.
    logprobs: of `update`, on the last pipeline stage: log pi of the response tokens [N] of each micro-batch, before the step.
    expert_load: how many response tokens went to each expert of each layer [layers, experts].
    """

    metrics: MetricSums
    grad_norm: float
    learning_rate: float
    skipped: bool
    timers: dict[str, float]
    loss_scale: float | None = None
    logprobs: tuple[Tensor, ...] = ()
    expert_load: Tensor | None = None


class MegatronEngine:
    """Model, gradients and optimizer of this rank; head `lm` for a policy, `scalar` for one number a token.

    optim None: a frozen model, which has neither gradients nor an optimizer. base: checksums of the weights of this stage beside which
    adapters are trained, by HF name; empty where all weights are trained.
    All public methods are collective over the role's ranks.
    """

    def __init__(
        self,
        arch: Architecture,
        model: ActorModelConfig,
        optim: OptimConfig | None,
        at: Coordinates,
        device: torch.device,
        head: str = "lm",
        lora: LoraConfig = LoraConfig(),
    ) -> None:
        self.arch, self.at, self.device, self.lora = arch, at, device, lora
        self.config = transformer_config(arch, model, at.tp, at.pp, at.cp)
        self.model = PackedModel(arch, self.config, head, layer_implementation(model, device)).to(device)
        self.adapters = Adapters(self.model, lora)
        self.state = ModelState(self.model, self.adapters)  # before the optimizer: it marks what is sharded
        self.pad_to = row_multiple(at.cp) * (at.tp if model.sequence_parallel else 1)  # rows of a micro-batch are a multiple of it
        self.frozen = optim is None
        self.base: dict[str, str] = {}
        if optim is None:
            self.model.requires_grad_(False)
        else:
            self._train_with(optim)

    def _train_with(self, optim: OptimConfig) -> None:
        self.optim = optim
        self.model.requires_grad_(False)
        for _, param in self.state.trained:
            param.requires_grad_(True)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        self.ddp = DataParallel(self.config, ddp, self.model)
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = True  # where Transformer Engine is installed too: its Adam counts steps elsewhere
        self.optimizer = get_megatron_optimizer(_optimizer_config(optim, self.config.params_dtype), [self.ddp])
        (self.distributed,) = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        for group in self.distributed.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False  # one pass over the state; on CPU several times faster than the default
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]  # 0 for norms and biases; Megatron leaves it to its scheduler
        # A strong reference would close a cycle (configuration, optimizer, gradient hooks, model) that runs through autograd's nodes, where
        # Python's collector does not see it: a dropped engine would keep its process groups, and gloo's 50 threads for them.
        scale = weakref.WeakMethod(self.optimizer.scale_loss)
        self.config.grad_scale_func = lambda loss: scale()(loss)  # type: ignore[misc]  # the model does not outlive its optimizer
        self.config.finalize_model_grads_func = lambda chunks, _tokens, **kw: finalize_model_grads(chunks, None, **kw)
        self.optimizer_state = OptimizerState(self.distributed)
        self.steps = 0

    @torch.no_grad()
    def load_hf(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights from whole HF tensors, and adapters from those or from lora.seed; fp32 master weights start from the full-precision
        values, not from the rounded model's."""
        read = Noting(tensors) if self.adapters.of else tensors
        self.state.fill(self.state.params, read, lambda param, shard: param.copy_(shard))
        if isinstance(read, Noting):
            self.base = read.digests
            tensors = with_adapters(tensors, self.arch, self.lora)
            self.state.fill(self.state.trained, tensors, lambda param, shard: param.copy_(shard))
        if self.frozen:
            return
        self.optimizer.reload_model_params()
        self.state.fill(self.state.trained, tensors, lambda param, shard: self.optimizer_state.set("param", param, shard.float()))

    def export(self, kind: str = "model") -> Iterator[tuple[str, Tensor]]:
        """This stage's tensors under HF names: `model` (compute dtype; adapters are added to the matrices), or of what is trained the fp32
        `param` (master weights), `exp_avg`, `exp_avg_sq`."""
        if kind == "model":
            return self.state.export(self.state.params, self.adapters.merged)
        if kind in OPTIMIZER_STATE:
            self.optimizer_state.allocate()  # before the first step there is none yet
        return self.state.export(self.state.trained, lambda param: self.optimizer_state.whole(param, kind))

    @torch.no_grad()
    def load_state(self, kinds: Mapping[str, Mapping[str, Tensor]], steps: int, adam_steps: int) -> None:
        """Master weights and moments from whole fp32 HF tensors (see training.checkpoint); the model's weights are their rounding."""

        def weights(param: Parameter, shard: Tensor) -> None:
            param.copy_(shard)
            self.optimizer_state.set("param", param, shard)

        self.optimizer_state.allocate()
        self.state.fill(self.state.trained, kinds["param"], weights)
        for kind in OPTIMIZER_STATE:
            self.state.fill(self.state.trained, kinds[kind], partial(self.optimizer_state.set, kind))
        self.optimizer_state.restore_steps(adam_steps)
        self.steps = steps

    @property
    def loss_scale(self) -> float | None:
        scaler = self.distributed.grad_scaler
        return None if scaler is None else float(scaler.scale)

    def loss_scaler(self) -> dict[str, float] | None:
        """The dynamic loss scale and the counters that move it; None or empty when there is none."""
        scaler = self.distributed.grad_scaler
        return scaler and {name: float(value) for name, value in scaler.state_dict().items()}

    def set_loss_scaler(self, state: Mapping[str, float]) -> None:
        counters = {name: int(value) for name, value in state.items()}
        self.distributed.grad_scaler.load_state_dict(counters | {"scale": torch.tensor([state["scale"]])})

    def logprobs(self, batches: Sequence[PackedBatch]) -> list[tuple[Tensor, Tensor]]:
        """(logprob_N, entropy_N) of the response tokens of every micro-batch; empty on all but the last pipeline stage."""
        with torch.no_grad():
            return self._run(batches, lambda i, output: (output[0].sum(), output), forward_only=True)

    def evaluate(self, batches: Sequence[PackedBatch], objective: Callable[[int, Any], tuple[Tensor, MetricSums]]) -> MetricSums:
        """The metrics of all micro-batches on all ranks, without a gradient."""
        with torch.no_grad():
            parts = self._run(batches, objective, forward_only=True)
        return merge_over_ranks(sum(parts[1:], parts[0]) if parts else None)

    def scores(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Head `scalar`: one fp32 number [N] for each response token of every micro-batch; empty on all but the last pipeline stage."""
        with torch.no_grad():
            return self._run(batches, lambda i, output: (output.sum(), output), forward_only=True)

    def update(
        self,
        batches: Sequence[PackedBatch],
        old_logprobs: Sequence[Tensor] | None,
        ref_logprobs: Sequence[Tensor] | None,
        denominators: Denominators,
        settings: ObjectiveSettings,
        early_stop_ratio: float | None,
        teaching: int | None = None,
    ) -> Update:
        """One optimizer step of the policy on one mini-batch. When its token-mean importance ratio exceeds early_stop_ratio or is NaN,
        nothing is stepped. teaching: see optimize().
        """
        logprobs: dict[int, Tensor] = {}

        def objective(i: int, output: tuple[Tensor, Tensor]) -> tuple[Tensor, MetricSums]:
            logprobs[i] = output[0].detach()
            old, ref = (None if values is None else values[i] for values in (old_logprobs, ref_logprobs))
            tokens = response_tokens(batches[i], output, old, ref)
            return policy_objective(tokens, denominators, settings)

        def stops(metrics: MetricSums) -> bool:
            return early_stop(metrics.sums["ratio"].item(), metrics.sums["tokens"].item(), early_stop_ratio)

        done = self.optimize(batches, objective, stops, teaching)
        return replace(done, logprobs=tuple(logprobs[i] for i in sorted(logprobs)))

    def update_values(
        self,
        batches: Sequence[PackedBatch],
        old_values: Sequence[Tensor],
        returns: Sequence[Tensor],
        denominators: Denominators,
        settings: ValueSettings,
    ) -> Update:
        """One optimizer step of the critic on one mini-batch, none where no token counts.

        old_values and returns: [N] of every micro-batch, on the last stage.
        """

        def objective(i: int, values_N: Tensor) -> tuple[Tensor, MetricSums]:
            b = batches[i]
            tokens = ValueTokens(values_N, old_values[i], returns[i], b.loss_mask_N, b.sample_N, b.n_samples)
            return value_objective(tokens, denominators, settings)

        return self.optimize(batches, objective, lambda metrics: metrics.sums["tokens"].item() == 0)

    def optimize(
        self,
        batches: Sequence[PackedBatch],
        objective: Callable[[int, Any], tuple[Tensor, MetricSums]],
        stops: Callable[[MetricSums], bool] = lambda _: False,
        teaching: int | None = None,
    ) -> Update:
        """One optimizer step on one mini-batch; objective(i, output of the head) is micro-batch i's share of loss and metrics.

        Every micro-batch contributes sum(token loss) / (global denominator), gradients are summed over micro-batches, DP and CP ranks, so
        the split does not matter. Then all ranks look at the mini-batch's metrics: where `stops` says so nothing is stepped: not the
        weights, not the moments, not the schedule, not the loss scale. Neither is a gradient stepped that is not finite.

        teaching: how many micro-batches, from the first on, have a gradient; None = all. The others are in the metrics only.
        """
        started = time.perf_counter()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.model.take_load()  # what was computed since the last step does not count
        teaching = len(batches) if teaching is None else teaching
        looked_at: list[Any] = []
        if batches[teaching:]:  # first: the ranks then wait for each other once, where gradients are summed
            with torch.no_grad():
                looked_at = self._run(batches[teaching:], lambda i, output: objective(teaching + i, output), forward_only=True)
        parts = self._run(batches[:teaching], objective, forward_only=False) + looked_at
        metrics = merge_over_ranks(sum(parts[1:], parts[0]) if parts else None)
        load = sum_over_stages(self.model.take_load().to(self.device)).cpu() if self.arch.experts else None
        computed = time.perf_counter()
        rate = learning_rate(self.optim, self.steps + 1)
        skipped, grad_norm, scale = stops(metrics), float("nan"), self.loss_scale
        if not skipped:
            for group in self.distributed.optimizer.param_groups:
                group["lr"] = rate
            stepped, grad_norm = self._step()
            skipped = not stepped
            self.steps += stepped
        ended = time.perf_counter()
        timers = {"forward_backward": computed - started, "optimizer": ended - computed}
        return Update(metrics, grad_norm, rate, skipped, timers, scale, expert_load=load)

    def _step(self) -> tuple[bool, float]:
        """(whether it stepped, gradient norm before clipping), the same on every rank. A gradient that is not finite steps nothing."""
        if self.distributed.prepare_grads():  # fp16: an overflow lowers the loss scale instead
            return False, math.nan
        norm = float(self.distributed.get_grad_norm())
        bound = self.distributed.config.clip_grad
        if bound < norm < math.inf:
            torch._foreach_mul_([p.grad for p in self.distributed.get_parameters()], bound / (norm + 1e-6))
        return math.isfinite(norm) and self.distributed.step_with_ready_grads(), norm

    def _run(self, batches: Sequence[PackedBatch], reduce: Callable[[int, Any], tuple[Tensor, Any]], forward_only: bool) -> list[Any]:
        """Megatron's schedule over the micro-batches; reduce(i, output) -> (loss to back-propagate, what to keep) on the last stage."""

        def forward_step(iterator: Iterator[tuple[int, PackedBatch]], _model: DataParallel | PackedModel) -> tuple[Any, Callable[..., Any]]:
            i, batch = next(iterator)

            def loss_function(output: Any) -> tuple[Tensor, Tensor, Any]:
                loss, kept = reduce(i, output)
                return loss, torch.zeros((), dtype=torch.int, device=self.device), kept

            return self.model.forward_packed(batch), loss_function

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(list(enumerate(batches))),
            model=[self.model if self.frozen else self.ddp],
            num_microbatches=len(batches),
            seq_length=1,  # unused: variable_seq_lengths exchanges the shapes
            micro_batch_size=1,
            forward_only=forward_only,
        )


def response_tokens(batch: PackedBatch, output: tuple[Tensor, Tensor], old: Tensor | None, ref: Tensor | None) -> ResponseTokens:
    return ResponseTokens(
        logprobs_N=output[0],
        entropy_N=output[1],
        old_logprobs_N=old,
        rollout_logprobs_N=batch.rollout_logprobs_N,
        ref_logprobs_N=ref,
        advantages_N=batch.advantages_N,
        loss_mask_N=batch.loss_mask_N,
        sample_N=batch.sample_N,
        n_samples=batch.n_samples,
        age_N=batch.age_N,
    )


def _optimizer_config(optim: OptimConfig, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad if optim.clip_grad > 0 else float("inf"),  # an infinite bound still measures the norm
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        loss_scale=optim.loss_scale,
        initial_loss_scale=optim.initial_loss_scale,
        loss_scale_window=optim.loss_scale_window,
    )
