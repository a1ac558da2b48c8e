"""What a rank's passes over its micro-batches cost, in floating-point operations (rlinf.scheduling.flops)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rlinf.config.schema import ActorModelConfig
from rlinf.scheduling.flops import Work, forward_flops, recomputed_flops
from rlinf.training.engine import MegatronEngine
from rlinf.training.layout import PackedBatch


def work_of(packs: Iterable[PackedBatch]) -> Work:
    return sum((Work(len(b.token_ids), len(b.predict_rows), b.attended_pairs) for b in packs), Work())


def rank_flops(
    engine: MegatronEngine, model: ActorModelConfig, forward_only: Mapping[str, Work], trained: Mapping[str, Work]
) -> dict[str, float]:
    """Operations of one rank, an even part of those of its model copy, by the timer of the part of the step.

    They are of passes without a gradient, of passes forward and backward, and what activation recompute adds to the latter (`again`).
    A head with one output is not counted.
    """
    copy = engine.at.tp * engine.at.cp * engine.at.pp

    def pass_over(work: Work) -> float:
        return forward_flops(engine.arch, work if engine.model.head == "lm" else Work(work.rows, 0, work.pairs)) / copy

    again = sum(recomputed_flops(engine.arch, model, work) for work in trained.values()) / copy
    found = {part: pass_over(work) for part, work in forward_only.items()} | {part: 3 * pass_over(work) for part, work in trained.items()}
    return found | {"again": again}
