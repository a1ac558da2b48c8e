"""Writes samples/tokens_NNNNNN.jsonl (rlinf.data.token_values) in the train workers, which have the values of each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlinf.data.lines import append_lines
from rlinf.data.packing import RankBatch
from rlinf.data.records import Group
from rlinf.data.token_values import DumpPlan, TokenValues
from rlinf.data.tokenizer import TextTokenizer
from rlinf.training.engine import Update
from rlinf.training.packed_batch import PackedBatch

Packs = Sequence[Sequence[PackedBatch]]  # [mini-batch][micro-batch]
OldLogprobs = Sequence[Sequence[torch.Tensor] | None]


def write_token_values(
    plan: DumpPlan,
    tokenizer: TextTokenizer,
    groups: Sequence[Group],
    batch: RankBatch,
    packs: Packs,
    old: OldLogprobs,
    updates: Sequence[Update],
) -> None:
    """Append a line for every sample of this rank. The line has tokens for the samples that the plan names, and for the sample with the
    largest gap of all ranks."""
    samples = {s.sample_id: s for g in groups for s in g.samples}
    mine = token_values(groups, batch, packs, old, updates)
    if not mine:
        return
    worst = max(mine, key=lambda v: v.largest_gap)
    of_all_ranks = max(u.metrics.maxima["gap"].item() for u in updates)
    in_full = plan.sample_ids | ({worst.sample_id} if 0 < of_all_ranks <= worst.largest_gap else set())
    pieces = {name: tokenizer.pieces(samples[name].token_ids.tolist()) for name in in_full & samples.keys()}
    append_lines(Path(plan.path), [v.line(pieces.get(v.sample_id)) for v in mine])


def token_values(groups: Sequence[Group], batch: RankBatch, packs: Packs, old: OldLogprobs, updates: Sequence[Update]) -> list[TokenValues]:
    """The values of every sample of this rank's share, in the order of training."""
    found = []
    for i, (mini, update) in enumerate(zip(batch.mini_batches, updates, strict=True)):
        for j, refs in enumerate(mini.micro_batches):
            pack, logprobs_N, then = packs[i][j], update.logprobs[j], old[i]
            old_N = logprobs_N if then is None else then[j]
            ignored_N = pack.loss_mask_N == 0
            columns = (pack.advantages_N, logprobs_N - old_N, old_N - pack.rollout_logprobs_N)
            arrays = [column.float().masked_fill(ignored_N, torch.nan).cpu().numpy() for column in columns]
            owner_N = pack.sample_N.cpu().numpy()
            for k, ref in enumerate(refs):
                mine = owner_N == k
                found.append(TokenValues(groups[ref.group].samples[ref.index].sample_id, *(a[mine] for a in arrays)))
    return found
