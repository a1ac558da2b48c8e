"""What tests of the training engine do inside the ranks of a pool: build an engine on a tiny model, train it, look at all of its state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlinf.algorithms.aggregation import Denominators
from rlinf.checks.layout import checksums  # noqa: F401  (for tests of rooms that may not import checks)
from rlinf.checks.layout_reference import SETTINGS, TEMPERATURE, Batch, make_batch, sample_logprobs  # noqa: F401
from rlinf.checks.tiny_model import VOCAB
from rlinf.config.schema import ActorModelConfig, LoraConfig, OptimConfig
from rlinf.data.packing import build_rank_batches
from rlinf.training.engine import MegatronEngine, Update
from rlinf.training.packed_batch import PackedBatch, pack
from rlinf.training.parallel import Coordinates
from rlinf.weights.architecture import open_architecture
from rlinf.weights.tensor_folder import open_hf_folder

OPTIM = OptimConfig(lr=1e-2, adam_eps=1e-8, weight_decay=0.0)
PLAIN = replace(SETTINGS, kl_beta=0.0, correction=None)  # no reference policy
MiniBatch = tuple[list[PackedBatch], Denominators, int]  # the micro-batches, of which the first so many have a gradient


def build(
    at: Coordinates,
    folder: Path,
    optim: OptimConfig = OPTIM,
    precision: str = "fp32",
    device: str = "cpu",
    lora: LoraConfig = LoraConfig(),
    **model: Any,
) -> MegatronEngine:
    """An engine with the folder's weights, laid out as the pool is."""
    arch, settings = open_architecture(folder), ActorModelConfig(at.tp, at.pp, precision=precision, **model)
    engine = MegatronEngine(arch, settings, optim, at, torch.device(device), lora=lora)
    engine.load_hf(open_hf_folder(folder))
    return engine


def minibatches(
    engine: MegatronEngine, n: int = 2, budget: int = 60, share_prefix: bool = True, batch: Batch | None = None, zero_teaches: bool = True
) -> list[MiniBatch]:
    """This rank's share of a random batch."""
    batch, at = batch or make_batch(VOCAB), engine.at
    headers = [g.header() for g in batch.groups]
    plan = build_rank_batches(
        headers, batch.advantages, dp=at.dp, n_minibatches=n, max_tokens=budget, share_prefix=share_prefix, zero_teaches=zero_teaches
    )[at.dp_rank]
    groups = [next(g for g in batch.groups if g.group_id == i) for i in plan.group_ids]
    packed = lambda refs: pack(groups, refs, share_prefix=share_prefix, temperature=TEMPERATURE, pad_to=engine.pad_to, device=engine.device)
    return [
        ([packed(refs) for refs in m.micro_batches], Denominators(m.global_tokens, m.global_samples), m.teaching) for m in plan.mini_batches
    ]


def logprobs(engine: MegatronEngine, packs: Sequence[PackedBatch]) -> list[torch.Tensor] | None:
    """Of every micro-batch; None on all but the last stage."""
    return [values for values, _ in engine.logprobs(packs)] or None


def update(engine: MegatronEngine, mini: MiniBatch, old: list[torch.Tensor] | None = None, early_stop: float | None = 5.0) -> Update:
    packs, denominators, teaching = mini
    return engine.update(packs, old, None, denominators, PLAIN, early_stop, teaching)


def numpy_dict(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in tensors}


def snapshot(engine: MegatronEngine) -> dict[str, bytes]:
    """Everything of this rank that an optimizer step may change, bit for bit."""
    optimizer = engine.distributed.optimizer
    found = {rule.megatron: raw(param) for rule, param in engine.state.params}
    for i, group in enumerate(optimizer.param_groups):
        for j, master in enumerate(group["params"]):
            found[f"master {i} {j}"] = raw(master)
            found |= {f"{kind} {i} {j}": raw(value) for kind, value in optimizer.state[master].items()}
    scaler = engine.distributed.grad_scaler
    found["scaler"] = (
        b"" if scaler is None else repr([v.tolist() if isinstance(v, torch.Tensor) else v for v in scaler.state_dict().values()]).encode()
    )
    found["steps"] = str(engine.steps).encode()
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def whole_state(engine: MegatronEngine) -> dict[str, dict[str, np.ndarray]]:
    """Model weights, master weights and moments of this stage under HF names; nothing on ranks beside the stage's first."""
    kinds = {kind: numpy_dict(engine.export(kind)) for kind in ("model", "param", "exp_avg", "exp_avg_sq")}
    return kinds if engine.at.leads and engine.at.dp_rank == 0 else {kind: {} for kind in kinds}


def merged(ranks: Sequence[dict[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    """whole_state of all stages together."""
    return {kind: {name: value for rank in ranks for name, value in rank[kind].items()} for kind in ranks[0]}
