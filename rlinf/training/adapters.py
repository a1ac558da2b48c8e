"""Low-rank adapters beside Megatron's matrices, in every parallel layout. What they are: weights.adapters.

A column-parallel matrix is sharded by its outputs, and so is B, while every rank has all of A; a row-parallel matrix is sharded by its
inputs, and so is A, while every rank has all of B. Ranks exchange the few numbers of A x; the matrix itself exchanges x or its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F

from rlinf.config.schema import LoraConfig
from rlinf.training.model import PackedModel
from rlinf.weights.adapters import merge, scale_of
from rlinf.weights.mapping import Rule, adapter_rules, adapter_shapes, hf_shapes, layer_rules, to_megatron


class Adapter(Module):
    """The adapters of one matrix of Megatron, which may hold several of Hugging Face, each with an A and a B of its own (q, k and v).

    a: their A one below the other [parts · rank, in]. b: [out, rank], a row for each row of the matrix. part_of: which of the parts a row
    of the matrix belongs to, as one-hot rows [out, parts].
    """

    part_of: Tensor

    def __init__(self, matrix: Module, rule: Rule, part_N: Tensor, lora: LoraConfig, model: PackedModel) -> None:
        super().__init__()
        weight: Parameter = matrix.weight  # type: ignore[assignment]
        rows, columns = weight.shape
        self.by_input, self.sequence_parallel, self.scale = rule.layout == "row", model.config.sequence_parallel, scale_of(lora)
        self.fused_norm_eps = model.config.layernorm_epsilon if hasattr(matrix, "layer_norm_weight") else None
        parts = len(rule.hf)
        self.a = Parameter(weight.new_empty(parts * lora.rank, columns))
        self.b = Parameter(weight.new_empty(rows, lora.rank))
        self.register_buffer("part_of", F.one_hot(part_N, parts).to(weight), persistent=False)
        # With sequence parallelism each rank sees its share of the rows: Megatron sums such gradients over the tensor-parallel ranks.
        setattr(self.b if self.by_input else self.a, "sequence_parallel", self.sequence_parallel)
        self.on = True

    def wide_b(self) -> Tensor:
        """B [out, parts · rank], zero where a row meets the A of another part."""
        return (self.part_of[:, :, None] * self.b[:, None, :]).flatten(1)

    def add(self, matrix: Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """A forward hook of the matrix: its output, and what the adapters make of the same input."""
        if not self.on:
            return output
        x = inputs[0]
        if self.fused_norm_eps is not None:  # Transformer Engine's module has the norm in front of the matrix inside
            x = F.rms_norm(x, x.shape[-1:], matrix.layer_norm_weight, self.fused_norm_eps)  # type: ignore[arg-type]
        low = F.linear(x, self.a)
        if self.by_input:
            low = (reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else reduce_from_tensor_model_parallel_region)(low)
        elif self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low)
        else:
            low = copy_to_tensor_model_parallel_region(low)
        out, bias = output
        added = torch.addmm(out.flatten(0, -2), (low * self.scale).flatten(0, -2), self.wide_b().t())  # one pass over the output
        return added.view_as(out), bias

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The matrix's shard with the adapters added to it."""
        return merge(weight, self.a, self.wide_b(), self.scale)


class Adapters:
    """All adapters of this rank's stage; none where lora.rank is 0.

    of: the matrices that have one. params: the adapters' own parameters, each with its rule. shapes: of those of the whole model, by HF
    name.
    """

    def __init__(self, model: PackedModel, lora: LoraConfig) -> None:
        self.of: dict[Parameter, Adapter] = {}
        self.lora = lora
        targets = lora.target_modules if lora.rank else ()
        self.shapes = adapter_shapes(model.arch, lora.rank, targets)
        for rule in (rule for layer in model.layers for rule in layer_rules(model.arch, layer)):
            *path, module, kind = model.local_name(rule.megatron).split(".")
            if module in targets and kind == "weight":
                matrix = model.get_submodule(".".join([*path, module]))
                adapter = Adapter(matrix, rule, _part_of_rows(rule, matrix, model), lora, model)
                matrix.add_module("adapter", adapter)
                matrix.register_forward_hook(adapter.add)
                self.of[matrix.weight] = adapter
        named = dict(model.named_parameters())
        self.params = [(rule, named[model.local_name(rule.megatron)]) for rule in adapter_rules(model.arch, model.layers, targets)]
        if self.of and model.pre_process:
            # Nothing in front of the first layer is trained, but activation recompute goes back only from what has a gradient.
            model.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(torch.is_grad_enabled()))

    def merged(self, param: Parameter) -> Tensor:
        """A parameter of the model as the rest of the world sees it: with the adapters added to it where it has some."""
        adapter = self.of.get(param)
        return param.detach() if adapter is None else adapter.merged(param.detach())

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model computes with its own weights alone."""
        before = [(adapter, adapter.on) for adapter in self.of.values()]
        for adapter, _ in before:
            adapter.on = False
        try:
            yield
        finally:
            for adapter, on in before:
                adapter.on = on

    @contextmanager
    @torch.no_grad()
    def in_the_weights(self) -> Iterator[None]:
        """Inside, the model computes with the merged weights, rounded as they are published; outside as before, bit for bit."""
        kept = {weight: weight.detach().to("cpu", copy=True) for weight in self.of}
        for weight, adapter in self.of.items():
            weight.copy_(adapter.merged(weight))
        try:
            with self.off():
                yield
        finally:
            for weight, value in kept.items():
                weight.copy_(value)


def _part_of_rows(rule: Rule, matrix: Module, model: PackedModel) -> Tensor:
    """Which of the rule's Hugging Face matrices each row of this rank's shard belongs to [out]: what becomes of matrices that hold nothing
    but their number."""
    weight: Parameter = matrix.weight  # type: ignore[assignment]
    if rule.layout == "row":
        return torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    shapes = hf_shapes(model.arch)
    numbered = [torch.full((shapes[name][0], 1), i, device=weight.device) for i, name in enumerate(rule.hf)]
    tp, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    return to_megatron(rule, numbered, model.arch, tp, rank)[:, 0]
