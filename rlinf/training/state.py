"""Parameters and optimizer state under their Hugging Face names. The only module that knows Megatron's layout at run time.

`export` gathers whole HF tensors from a TP x PP x DP layout; `fill` cuts the shards of a layout from whole HF tensors. Loading a model,
publishing weights, checkpoints and HF exports use only these two, so all of them work between any two layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from rlinf.errors import UserError
from rlinf.training.adapters import Adapters
from rlinf.training.model import PackedModel
from rlinf.weights.adapters import trained_shapes
from rlinf.weights.mapping import Rule, hf_shapes, model_rules, to_hf, to_megatron

GATHER_BYTES = 64 << 20
Parameters = list[tuple[Rule, Parameter]]
OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq")


class ModelState:
    """The parameters of this rank's stage, each with its rule.

    params: those of the model. trained: those that an optimizer steps; with adapters these alone, and the head of a `scalar` model.
    shapes: of the whole model, adapters included; trained_shapes: of what is trained.
    """

    def __init__(self, model: PackedModel, adapters: Adapters) -> None:
        self.arch = model.arch
        self.tp, self.tp_rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        self.tp_group = mpu.get_tensor_model_parallel_group()
        rules = model_rules(self.arch, model.layers, model.pre_process, model.post_process, model.head, model.fused_norms)
        named = dict(model.named_parameters())
        self.params: Parameters = [(r, named.pop(model.local_name(r.megatron))) for r in rules]
        self.trained = self.params
        if adapters.of:
            for rule, _ in adapters.params:
                named.pop(model.local_name(rule.megatron))
            self.trained = adapters.params + [(r, p) for r, p in self.params if r.megatron == "score"]
        if named:
            raise RuntimeError(f"parameters without a mapping rule: {sorted(named)}")
        self.shapes = hf_shapes(self.arch, model.head) | adapters.shapes
        self.trained_shapes = trained_shapes(self.arch, adapters.lora, model.head)
        for rule, param in self.params + self.trained:  # Megatron's gradient norm counts a parameter without this mark on TP rank 0 only
            setattr(param, "tensor_model_parallel", rule.sharded)

    def fill(self, params: Parameters, hf: Mapping[str, Tensor], target: Callable[[Parameter, Tensor], object]) -> None:
        """Call target(param, local shard) for each of `params`. `hf` may read lazily; a missing name raises KeyError."""
        for rule, param in params:
            whole = [hf[name] for name in rule.hf]
            for name, tensor in zip(rule.hf, whole):
                if tensor.shape != self.shapes[name]:
                    raise UserError(f"tensor {name} is {tuple(tensor.shape)}, but {self.shapes[name]} by the model's config.json")
            target(param, to_megatron(rule, whole, self.arch, self.tp, self.tp_rank))

    def export(self, params: Parameters, source: Callable[[Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Whole HF tensors of `params`, gathered over TP in coalesced runs. source(param) gives the local shard.

        Collective over the TP group: every TP rank must iterate to the end. The tied copy of the embedding on the last stage is left out.
        """
        own = [(r, p) for r, p in params if r.megatron != "output_layer.weight" or not self.arch.tied]
        run: list[tuple[Rule, Tensor]] = []
        nbytes = 0
        for rule, param in own:
            run.append((rule, source(param)))
            nbytes += run[-1][1].nbytes
            if nbytes >= GATHER_BYTES:
                yield from self._gather(run)
                run, nbytes = [], 0
        yield from self._gather(run)

    def _gather(self, run: list[tuple[Rule, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        if self.tp == 1:
            for rule, tensor in run:
                yield from to_hf(rule, [tensor], self.arch)
            return
        if not run:
            return
        flat = torch.cat([t.reshape(-1) for _, t in run])
        pieces = [torch.empty_like(flat) for _ in range(self.tp)]
        dist.all_gather(pieces, flat, group=self.tp_group)
        split = [p.split([t.numel() for _, t in run]) for p in pieces]
        for i, (rule, tensor) in enumerate(run):
            yield from to_hf(rule, [shards[i].view_as(tensor) for shards in split], self.arch)


class OptimizerState:
    """Master weights and Adam moments of a distributed optimizer, seen parameter by parameter in the model's shapes."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self.optimizer = optimizer
        self.group = mpu.get_data_parallel_group(with_context_parallel=True)  # over which the state is divided

    @torch.no_grad()
    def whole(self, param: Parameter, kind: str) -> Tensor:
        """The fp32 state `kind` (param, exp_avg, exp_avg_sq) in the shape of this rank's model shard; collective over DP and CP."""
        full = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
        if param in self.optimizer.model_param_group_index_map:
            rows = self.optimizer._get_model_param_range_map(param)["param"]
            full[rows.start : rows.end] = self._tensors(param)[kind].view(-1)
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(full, group=self.group)
        return full.view_as(param)

    def set(self, kind: str, param: Parameter, value: Tensor) -> None:
        """Copy this rank's share of a whole fp32 tensor into the optimizer, as its state `kind` of the parameter."""
        if param in self.optimizer.model_param_group_index_map:
            rows = self.optimizer._get_model_param_range_map(param)["param"]
            target = self._tensors(param)[kind]
            target.copy_(value.reshape(-1)[rows.start : rows.end].view_as(target))

    def steps(self) -> int:
        """Optimizer steps taken: torch's Adam keeps one count per parameter, and they are equal."""
        counts = {int(s["step"]) for s in self.optimizer.optimizer.state.values() if "step" in s}
        if len(counts) > 1:
            raise RuntimeError(f"Adam step counts differ between parameters: {sorted(counts)}")
        return counts.pop() if counts else 0

    def restore_steps(self, steps: int) -> None:
        for state in self.optimizer.optimizer.state.values():
            # one tensor a parameter: an aliased one would be counted once per parameter; beside the moments, where fused Adam reads it
            state["step"] = torch.tensor(float(steps), device=state["exp_avg"].device)

    def allocate(self) -> None:
        """Give every parameter its Adam state, so that a checkpoint can be filled in before the first step."""
        for group in self.optimizer.optimizer.param_groups:
            for p in group["params"]:
                state = self.optimizer.optimizer.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0, device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)

    def _tensors(self, param: Parameter) -> dict[str, Tensor]:
        return self.optimizer._get_main_param_and_optimizer_states(param)
