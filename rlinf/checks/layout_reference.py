"""The step that `rlinf check layout` looks at, and what it must give: two optimizer steps in plain transformers and torch.

One sample after another, unpadded and unpacked, in one process: nothing here is shared with the training engine but the data.
The optimizer is Adam without clipping, with beta1 = 0 and a large epsilon, so that a constant factor on the gradient shows in the
weights, and a weight decay, so that it shows which weights decay.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinf.algorithms.importance import Correction
from rlinf.algorithms.objective import ObjectiveSettings
from rlinf.algorithms.values import ValueSettings
from rlinf.config.schema import LoraConfig, OptimConfig
from rlinf.data.records import Finish, Group, Prompt, Sample, sample_id

TEMPERATURE = 1.3
OPTIM = OptimConfig(lr=0.2, adam_beta1=0.0, adam_beta2=0.95, adam_eps=1.0, weight_decay=0.1, clip_grad=0.0)
IMPORTANCE_LIMIT, DUAL_CLIP, VALUE_CLIP = 2.0, 1.5, 0.02
LORA = LoraConfig(rank=3, alpha=4.5)
LORA_SCALE = 1.5
SETTINGS = ObjectiveSettings(
    loss_type="ppo", loss_agg_func="token-mean", clip_low=0.2, clip_high=0.3, clip_c=DUAL_CLIP, kl_beta=0.1, kl_penalty_type="k3",
    entropy_bonus=0.02, correction=Correction("token-truncate", 0.0, IMPORTANCE_LIMIT), max_new_tokens=16,
)  # fmt: skip
VALUE_SETTINGS = ValueSettings(loss_agg_func="token-mean", clip=VALUE_CLIP, max_new_tokens=16)
# Prompt length and response lengths of the groups: lengths 1, equal and unequal ones, a group of one, one response far longer than the
# rest; the prompts of the second half begin with the same COMMON_START tokens, as with a system prompt or worked examples.
COMMON_START = 18
SHAPES = ((5, (3, 1, 7, 4)), (1, (6,)), (9, (2, 2, 2)), (4, (1, 1)), (7, (16, 3, 5)), (3, (8, 4, 1)))


@dataclass(frozen=True)
class Batch:
    """Groups and their advantages by sample; the first half of the groups is the first mini-batch."""

    groups: tuple[Group, ...]
    advantages: tuple[np.ndarray, ...]

    @property
    def minibatches(self) -> list[tuple[Sequence[Group], Sequence[np.ndarray]]]:
        half = len(self.groups) // 2
        return [(self.groups[:half], self.advantages[:half]), (self.groups[half:], self.advantages[half:])]

    def shuffled(self, seed: int) -> Batch:
        """The same mini-batches, their groups and the groups' samples in another order; seed 0 changes nothing."""
        if seed == 0:
            return self
        rng = np.random.default_rng(seed)
        half = len(self.groups) // 2
        order = [int(i) + first for first in (0, half) for i in rng.permutation(half)]
        samples = [rng.permutation(len(self.groups[g].samples)) for g in order]
        return Batch(
            tuple(
                Group(self.groups[g].group_id, self.groups[g].prompt, tuple(self.groups[g].samples[i] for i in s))
                for g, s in zip(order, samples)
            ),
            tuple(self.advantages[g][s] for g, s in zip(order, samples)),
        )


@dataclass(frozen=True)
class Step:
    """What one optimizer step gives: metrics, gradients and weights afterwards by HF name, the gradient's norm."""

    metrics: dict[str, float]
    grad_norm: float
    grads: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class Expected:
    """What every layout must give. start: the initial weights; outputs: log-probabilities or values [T] of the initial model by sample."""

    start: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    steps: list[Step]


def make_batch(vocab: int, seed: int = 0) -> Batch:
    """Random groups; some tokens were not sampled by the policy (mask 0, no rollout log-probability), one sample not at all."""
    rng = np.random.default_rng(seed)
    common, groups = rng.integers(0, vocab, COMMON_START), []
    for g, (prompt_length, lengths) in enumerate(SHAPES):
        own = rng.integers(0, vocab, prompt_length)
        tokens = own if g < len(SHAPES) // 2 else np.concatenate([common, own])
        prompt = Prompt(f"p{g}", tokens.astype(np.int32), "math", ("",))
        samples = []
        for i, n in enumerate(lengths):
            mask = (rng.random(n) < 0.9).astype(np.uint8) * ((g, i) != (2, 1))
            rollout = np.where(mask == 1, rng.normal(-5.0, 0.7, n), np.nan).astype(np.float32)
            samples.append(
                Sample(
                    sample_id(f"p{g}", i),
                    rng.integers(0, vocab, n).astype(np.int32),
                    rollout,
                    mask.astype(np.uint8),
                    ((0, n),),
                    Finish.STOP,
                )
            )
        groups.append(Group(f"p{g}", prompt, tuple(samples)))
    return Batch(tuple(groups), tuple(rng.normal(0, 1, len(g.samples)).astype(np.float32) for g in groups))


def plain_steps(folder: Path, batch: Batch, head: str = "lm", adapted: Collection[str] = (), epochs: int = 1) -> Expected:
    """Both mini-batches, one after the other; the old policy, the reference policy and the old values are those of the initial weights.

    adapted: last names of the matrices beside which adapters are trained, in place of all weights. epochs: passes over both mini-batches.
    """
    model = plain_model(folder, head)
    if adapted:
        add_adapters(model, adapted)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    param_groups: list[dict[str, Any]] = [
        {"params": [p for p in named.values() if p.ndim > 1]},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},  # norms and biases do not decay
    ]
    optimizer = torch.optim.AdamW(
        param_groups,
        lr=OPTIM.lr, betas=(OPTIM.adam_beta1, OPTIM.adam_beta2), eps=OPTIM.adam_eps, weight_decay=OPTIM.weight_decay,
    )  # fmt: skip
    start = whole_weights(model)
    old = old_outputs(model, batch)
    steps = []
    for groups, advantages in epochs * batch.minibatches:
        optimizer.zero_grad()
        loss, metrics = (plain_objective if head == "lm" else plain_value_objective)(model, groups, advantages, old)
        loss.backward()
        grads = by_file_name({name: p.grad for name, p in named.items()})  # type: ignore[misc]  # the loss is of all of them
        optimizer.step()
        norm = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values())))
        steps.append(Step(metrics, norm, grads, whole_weights(model)))
    return Expected(start, {name: values.numpy() for name, values in old.items()}, steps)


def plain_model(folder: Path, head: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    if head == "lm":
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
    return AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=1, dtype=torch.float32, attn_implementation="eager")


def add_adapters(model: torch.nn.Module, adapted: Collection[str]) -> None:
    """A and B beside the matrices with these last names; they alone are trained, and the head of a critic."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "score.weight")
    for name, matrix in [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in adapted]:
        assert isinstance(matrix, torch.nn.Linear)
        for x, rows, columns in (("A", LORA.rank, matrix.in_features), ("B", matrix.out_features, LORA.rank)):
            made = torch.nn.Linear(columns, rows, bias=False)
            made.weight.data.copy_(first_adapter(f"{name}.lora_{x}.weight", (rows, columns)))
            matrix.add_module(f"lora_{x}", made)
        matrix.register_forward_hook(lambda m, inputs, output: output + LORA_SCALE * m.lora_B(m.lora_A(inputs[0])))


def first_adapter(name: str, shape: tuple[int, ...]) -> Tensor:
    """Where adapters begin here: unlike in a run, B is not 0, so that A has a gradient."""
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def whole_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights by HF name, with the adapters added to them, and the adapters themselves."""
    found = {}
    for name, p in model.named_parameters():
        module: Any = model.get_submodule(name.rpartition(".")[0])
        added = LORA_SCALE * (module.lora_B.weight @ module.lora_A.weight) if hasattr(module, "lora_A") and p.ndim == 2 else 0
        found[name] = (p + added).detach()
    return by_file_name(found)


def by_file_name(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies of tensors of a transformers model under the names of its files, which hold each expert by itself."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, experts, kind = name.partition(".experts.")
        for e, matrix in enumerate(tensor) if experts else ():
            halves = zip(("gate_proj", "up_proj"), matrix.chunk(2)) if kind == "gate_up_proj" else [(kind, matrix)]
            found |= {f"{before}.experts.{e}.{part}.weight": half for part, half in halves}
        if not experts:
            found[name] = tensor
    return {name: tensor.numpy().copy() for name, tensor in found.items()}


def old_outputs(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    """[T] of every sample: log-probabilities, or values of a model with a scalar head."""
    output = sample_values if hasattr(model, "score") else lambda *args: sample_logprobs(*args)[0]
    with torch.no_grad():
        return {s.sample_id: output(model, g, s) for g in batch.groups for s in g.samples}


def sample_values(model: torch.nn.Module, group: Group, sample: Sample) -> Tensor:
    """[T]: the value of the state before each token of the sample, read from the hidden state that predicts it."""
    tokens = torch.from_numpy(np.concatenate([group.prompt.token_ids, sample.token_ids]).astype(np.int64))
    hidden = model.get_submodule("model")(tokens[None]).last_hidden_state[0]
    return model.get_submodule("score")(hidden)[len(group.prompt.token_ids) - 1 : -1, 0]


def sample_logprobs(model: torch.nn.Module, group: Group, sample: Sample) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) [T] of the sample's tokens, computed from its prompt and itself alone."""
    prompt, own = (torch.from_numpy(ids.astype(np.int64)) for ids in (group.prompt.token_ids, sample.token_ids))
    logits = model(torch.cat([prompt, own])[None]).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(1, own[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


def plain_objective(
    model: torch.nn.Module, groups: Sequence[Group], advantages: Sequence[np.ndarray], old: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Token-mean PPO loss with dual clip, KL, entropy bonus and importance weights, and the metrics, over all tokens at once."""
    parts: list[tuple[Tensor, ...]] = []
    for group, group_advantages in zip(groups, advantages):
        for sample, advantage in zip(group.samples, group_advantages):
            keep = torch.from_numpy(sample.loss_mask.astype(bool))
            logprobs, entropy = sample_logprobs(model, group, sample)
            rollout = torch.from_numpy(sample.rollout_logprobs)
            parts.append(
                tuple(t[keep] for t in (logprobs, entropy, old[sample.sample_id], rollout, torch.full_like(logprobs, float(advantage))))
            )
    logprobs, entropy, before, rollout, advantage = (torch.cat(p) for p in zip(*parts))
    ratio, importance = (logprobs - before).exp(), (before - rollout).exp()
    plain, bounded = -ratio * advantage, -ratio.clamp(1 - SETTINGS.clip_low, 1 + SETTINGS.clip_high) * advantage
    policy = torch.maximum(plain, bounded)
    ceiling = torch.where(advantage < 0, -DUAL_CLIP * advantage, float("inf"))
    weighted = torch.minimum(policy, ceiling) * importance.clamp(max=IMPORTANCE_LIMIT)
    kl = k3(before - logprobs)
    loss = weighted.mean() + SETTINGS.kl_beta * kl.mean() - SETTINGS.entropy_bonus * entropy.mean()
    gap = (before - rollout).abs()
    metrics = {
        "train/loss": weighted.mean(),
        "train/entropy_loss": entropy.mean(),
        "train/ratio": ratio.mean(),
        "train/clip_fraction": (bounded > plain).float().mean(),
        "train/dual_clip_fraction": (policy > ceiling).float().mean(),
        "train/approx_kl": k3(logprobs - before).mean(),
        "train/kl_loss": kl.mean(),
        "train/rollout_logprob_gap_mean": gap.mean(),
        "train/rollout_logprob_gap_max": gap.max(),
        "train/tokens": torch.tensor(len(ratio)),
        "train/importance_weight_mean": importance.mean(),
        "train/importance_weight_max": importance.max(),
        "train/importance_weight_min": importance.min(),
        "train/importance_weight_clipped": (importance > IMPORTANCE_LIMIT).float().mean(),
        "train/rollout_kl": k3(before - rollout).mean(),
    }
    return loss, {name: value.item() for name, value in metrics.items()} | expert_load(model, groups)


def expert_load(model: torch.nn.Module, groups: Sequence[Group]) -> dict[str, float]:
    """The largest share of an expert in the choices of its layer, in units of the even share, and the share of experts without a token,
    as the routers of transformers choose for the rows that predict response tokens; empty without experts."""
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    if not routers:
        return {}
    chosen: list[list[Tensor]] = [[] for _ in routers]
    hooks = [r.register_forward_hook(lambda _m, _x, out, found=found: found.append(out[2])) for r, found in zip(routers, chosen)]
    for group, sample in ((g, s) for g in groups for s in g.samples):
        with torch.no_grad():
            sample_logprobs(model, group, sample)
        for found in chosen:
            found[-1] = found[-1][-len(sample.token_ids) - 1 : -1].flatten()
    for hook in hooks:
        hook.remove()
    experts: int = getattr(model, "config").num_experts
    counts = np.array([np.bincount(torch.cat(found), minlength=experts) for found in chosen])
    even = counts.sum(1, keepdims=True) / counts.shape[1]
    return {"train/expert_load_max": float((counts / even).max()), "train/experts_unused": float((counts == 0).mean())}


def plain_value_objective(
    model: torch.nn.Module, groups: Sequence[Group], targets: Sequence[np.ndarray], old: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Token-mean value loss with clipping, and the metrics; a sample's target is the same at all of its tokens."""
    parts: list[tuple[Tensor, ...]] = []
    for group, group_targets in zip(groups, targets):
        for sample, target in zip(group.samples, group_targets):
            keep = torch.from_numpy(sample.loss_mask.astype(bool))
            values = sample_values(model, group, sample)
            parts.append((values[keep], old[sample.sample_id][keep], torch.full_like(values, float(target))[keep]))
    values, before, target = (torch.cat(p) for p in zip(*parts))
    near = torch.minimum(torch.maximum(values, before - VALUE_CLIP), before + VALUE_CLIP)
    plain, bounded = (values - target) ** 2 / 2, (near - target) ** 2 / 2
    loss, error = torch.maximum(plain, bounded).mean(), target - before
    metrics = {
        "critic/loss": loss,
        "critic/value_mean": before.mean(),
        "critic/return_mean": target.mean(),
        "critic/value_error": error.square().mean().sqrt(),
        "critic/value_error_max": error.abs().max(),
        "critic/explained_variance": 1 - error.var(correction=0) / target.var(correction=0),
        "critic/clip_fraction": (bounded > plain).float().mean(),
    }
    return loss, {name: value.item() for name, value in metrics.items()}


def k3(difference: Tensor) -> Tensor:
    return (difference.exp() - difference - 1).clamp(max=10.0)
