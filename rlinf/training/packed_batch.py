"""One micro-batch as the model sees it: variable-length sequences, concatenated, nothing padded to seq_length.

The samples of one prompt may share one copy of the prompt's tokens ("shared prefix"): a packed group is then

    prompt | response 1 | response 2 | ...

where every response attends to the prompt and to itself only, and its positions go on from the prompt's. A group with one sample is a plain
causal sequence, and so is each sample of a group for which sharing does not pay (data.packing.sharing_pays). What the prompts of different
groups have in common at their start (a system prompt, worked examples) is packed once too, in front of everything, and all groups attend to
it. The last token of a response predicts nothing that is trained, so it is not packed at all.

Shape legend: T packed rows, N response tokens, S samples, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rlinf.data.examples import example
from rlinf.data.packing import SampleRef
from rlinf.data.records import Group, Sample
from rlinf.training.context import Share

COMMON_MIN = 16  # a shorter common start is not worth the concatenation of keys that it costs


@dataclass(frozen=True)
class PackedGroup:
    """`prompt` rows of the prompt, then the rows of its responses, one count for each (it may be 0). Without responses: rows that all
    groups begin with, or padding."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def own(self) -> int:
        return sum(self.responses)


@dataclass(kw_only=True)
class PackedBatch(PackedSeqParams):
    """Rows, positions and groups, and for each response token the row that predicts it.

    It travels through Megatron as packed_seq_params (format thd), which is how the attention and the head get to see it.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    packed_groups: tuple[PackedGroup, ...]
    predict_rows: Tensor  # [N] int64
    targets: Tensor  # [N] int64
    sample_N: Tensor  # [N] int64, which of the S samples a token belongs to
    advantages_N: Tensor  # [N] float32
    loss_mask_N: Tensor  # [N] float32
    rollout_logprobs_N: Tensor  # [N] float32
    age_N: Tensor | None = None  # [N] float32, for an interpolated pi_prox (algorithms.importance)
    n_samples: int
    sample_ids: tuple[str, ...]  # of the S samples, in the order of their tokens
    common: int  # rows of the start that all prompts share: the first of packed_groups, if any
    temperature: float
    share: Share = field(init=False, repr=False)  # what this rank does of it; the model fills it in once, and the next
    rope: tuple[Tensor, Tensor] = field(init=False, repr=False)  # cos and sin of the share's rows [t, 1, D]

    @property
    def attended_pairs(self) -> int:
        """(query, key) pairs that attend to each other; a row attends to itself too."""
        pairs = 0
        for i, group in enumerate(self.packed_groups):
            before = self.common if i else 0
            pairs += _causal(group.prompt, before) + sum(_causal(n, before + group.prompt) for n in group.responses)
        return pairs


def pack(
    groups: Sequence[Group], refs: Sequence[SampleRef], *, share_prefix: bool, temperature: float, pad_to: int, device: torch.device
) -> PackedBatch:
    """Pack the samples named by refs.

    pad_to: rows are padded to a multiple of it (the engine's pad_to); an empty refs gives one inert row.
    """
    rows: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    packed_groups: list[PackedGroup] = []
    predict: list[np.ndarray] = []
    order: list[tuple[Sample, float]] = []
    members_of = _by_prompt(refs, share_prefix)
    start = common = _common_start([groups[members[0].group].prompt.token_ids for members in members_of]) if share_prefix else 0
    if common:
        rows.append(groups[members_of[0][0].group].prompt.token_ids[:common])
        positions.append(np.arange(common))
        packed_groups.append(PackedGroup(common, ()))
    for members in members_of:
        prompt = groups[members[0].group].prompt.token_ids[common:]
        samples = [groups[r.group].samples[r.index] for r in members]
        order += [(s, r.advantage) for s, r in zip(samples, members)]
        rows += [prompt, *(s.token_ids[:-1] for s in samples)]
        length = common + len(prompt)
        positions += [np.arange(common, length), *(np.arange(length, length + len(s) - 1) for s in samples)]
        counts = tuple(len(s) - 1 for s in samples)
        packed_groups.append(PackedGroup(len(prompt), counts))
        first = start + len(prompt)
        for n in counts:  # token 0 is predicted by the prompt's last row, token t > 0 by the row of token t - 1
            predict.append(np.concatenate([[start + len(prompt) - 1], np.arange(first, first + n)]))
            first += n
        start = first
    padding = -start % pad_to if start else pad_to
    if padding:
        rows.append(np.zeros(padding, np.int64))
        positions.append(np.arange(padding))
        packed_groups.append(PackedGroup(padding, ()))
    lengths = [len(s) for s, _ in order]
    tensor = lambda parts, dtype: torch.as_tensor(np.concatenate([*parts, []]).astype(dtype), device=device)
    return PackedBatch(
        qkv_format="thd",
        token_ids=tensor(rows, np.int64),
        positions=tensor(positions, np.int64),
        packed_groups=tuple(packed_groups),
        predict_rows=tensor(predict, np.int64),
        targets=tensor([s.token_ids for s, _ in order], np.int64),
        sample_N=tensor([np.repeat(np.arange(len(order)), lengths)], np.int64),
        advantages_N=tensor([np.repeat([a for _, a in order], lengths)], np.float32),
        loss_mask_N=tensor([s.loss_mask for s, _ in order], np.float32),
        rollout_logprobs_N=tensor([s.rollout_logprobs for s, _ in order], np.float32),
        n_samples=len(order),
        sample_ids=tuple(s.sample_id for s, _ in order),
        common=common,
        temperature=temperature,
    )


def _causal(rows: int, before: int) -> int:
    return rows * before + rows * (rows + 1) // 2


def by_sample(batch: PackedBatch, values_N: Tensor) -> dict[str, np.ndarray]:
    """The batch's tokens apart again: sample id -> [T] of that sample."""
    lengths = torch.bincount(batch.sample_N, minlength=batch.n_samples).tolist()
    return {i: part.cpu().numpy() for i, part in zip(batch.sample_ids, values_N.split(lengths))}


def by_token(batch: PackedBatch, values: Mapping[str, np.ndarray]) -> Tensor:
    """[N] float32 from the [T] of every sample of the batch."""
    parts = [values[i] for i in batch.sample_ids]
    return torch.as_tensor(np.concatenate([*parts, []]).astype(np.float32), device=batch.targets.device)


def pack_sequences(sequences: Sequence[np.ndarray], pad_to: int, device: torch.device) -> PackedBatch:
    """Sequences whose log-probabilities are wanted, each by itself and at temperature 1: its first token stands as the prompt, the n-1
    others as a response."""
    groups = [example(f"sequence-{i}", tokens[:1], tokens[1:]) for i, tokens in enumerate(sequences)]
    refs = [SampleRef(i, 0, 0.0) for i in range(len(groups))]
    return pack(groups, refs, share_prefix=False, temperature=1.0, pad_to=pad_to, device=device)


def _common_start(prompts: Sequence[np.ndarray]) -> int:
    """Tokens that all prompts begin with, at least one fewer than the shortest has (its last row must be its own)."""
    if len(prompts) < 2:
        return 0
    limit = min(map(len, prompts)) - 1
    differs = np.flatnonzero((np.stack([p[:limit] for p in prompts]) != prompts[0][:limit]).any(0))
    common = int(differs[0]) if len(differs) else limit
    return common if common >= COMMON_MIN else 0


def _by_prompt(refs: Sequence[SampleRef], share_prefix: bool) -> list[list[SampleRef]]:
    members: dict[tuple[int, ...], list[SampleRef]] = {}
    for r in refs:
        members.setdefault((r.group,) if share_prefix and r.shares else (r.group, r.index), []).append(r)
    return list(members.values())
