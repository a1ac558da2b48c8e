"""Context parallelism: the rows of a micro-batch over the ranks of a group. Everything that knows of it stands here.

A rank computes embedding, norms, matrices and head for its own rows. In attention the keys and values of all rows are gathered (as in
arXiv 2407.21783 §3.3.2), and the rank's queries attend to what is before them in their sequences; backward, the gradients that the ranks'
queries owe to a key are summed on the rank that has it. What the head gives for each response token is gathered on all ranks of the group:
so objectives, metrics and token dumps see whole samples, just as they do on the ranks of a tensor-parallel group.

A causal mask makes late rows dearer. The rows are cut into 2 C equal chunks, and rank r has chunks r and 2 C - 1 - r.

Shape legend: C ranks, T packed rows, t rows of one rank, N response tokens, n those that this rank's rows predict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from rlinf.training.packed_batch import PackedBatch, PackedGroup

Range = tuple[int, int]  # rows of the micro-batch


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of this rank that are computed in one go. prefix and own name atoms of keys, in order.

    Without responses: the last rows of the sequence `prefix | own`, causal. With them: several responses, their row counts in order, each
    behind the same prefix; slots says where each row stands in a [responses, longest] grid, flattened, unless the rows fill it in order.
    """

    rows: int
    prefix: tuple[int, ...]
    own: tuple[int, ...]
    responses: tuple[int, ...] = ()
    slots: Tensor | None = None

    @property
    def longest(self) -> int:
        return max(self.responses)


@dataclass(frozen=True)
class Share:
    """What one rank of the group does of a micro-batch. atoms: lengths of the ranges into which the keys of all T rows are cut."""

    token_ids: Tensor  # [t]
    positions: Tensor  # [t]
    pieces: tuple[Piece, ...]
    atoms: tuple[int, ...]
    predict_rows: Tensor  # [n], of the t
    tokens: Tensor | None  # [n], of the N; None = all of them


def row_multiple(size: int) -> int:
    """The rows of a micro-batch are a multiple of this, so that the chunks are equal."""
    return 2 * size if size > 1 else 1


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def share_of(batch: PackedBatch, rank: int, size: int) -> Share:
    """The share of rank `rank` of `size`. Raises ValueError when the rows do not make equal chunks."""
    total = len(batch.token_ids)
    if total % row_multiple(size):
        raise ValueError(f"{total} rows are not a multiple of {row_multiple(size)}: pack with the engine's pad_to")
    chunks = [(0, total)]
    if size > 1:
        length = total // (2 * size)
        chunks = [(chunk * length, (chunk + 1) * length) for chunk in chunks_of(rank, size)]
    pieces, atoms = plan_pieces(batch.packed_groups, batch.common, chunks, batch.token_ids.device)
    if size == 1:
        return Share(batch.token_ids, batch.positions, pieces, atoms, batch.predict_rows, None)
    rows = torch.cat([torch.arange(first, last, device=batch.token_ids.device) for first, last in chunks])
    place = torch.full((total,), -1, device=rows.device).index_copy_(0, rows, torch.arange(len(rows), device=rows.device))[
        batch.predict_rows
    ]
    tokens = (place >= 0).nonzero()[:, 0]
    return Share(batch.token_ids[rows], batch.positions[rows], pieces, atoms, place[tokens], tokens)


def plan_pieces(
    packed_groups: Sequence[PackedGroup], common: int, chunks: Sequence[Range], device: torch.device
) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    """The pieces of the rows in `chunks`, in their order, and the lengths of the atoms that they name. Responses that lie wholly in a chunk
    are computed together, one that a chunk's border cuts by itself."""
    found: list[tuple[tuple[Range, ...], Range, list[Range]]] = []  # prefix, keys of its own, rows
    for first, last in chunks:
        for prefix, sequences in _families(packed_groups, common):
            here = [s for s in sequences if max(s[0], first) < min(s[1], last)]
            for whole, some in groupby(here, lambda s: first <= s[0] and s[1] <= last):
                members = list(some)
                if whole and len(members) > 1:
                    found.append((prefix, (members[0][0], members[-1][1]), members))
                else:
                    found += [(prefix, (a, min(b, last)), [(max(a, first), min(b, last))]) for a, b in members]
    total = sum(s.prompt + s.own for s in packed_groups)
    borders = sorted({0, total, *(row for prefix, own, _ in found for part in (*prefix, own) for row in part)})
    number = {row: i for i, row in enumerate(borders)}
    atoms = lambda ranges: tuple(i for a, b in ranges for i in range(number[a], number[b]))
    pieces = []
    for prefix, own, rows in found:
        counts = tuple(b - a for a, b in rows)
        many = (counts, _slots(counts, device)) if len(counts) > 1 else ()
        pieces.append(Piece(sum(counts), atoms(prefix), atoms([own]), *many))
    return tuple(pieces), tuple(b - a for a, b in pairwise(borders))


def _families(packed_groups: Sequence[PackedGroup], common: int) -> Iterator[tuple[tuple[Range, ...], list[Range]]]:
    """Sequences that stand behind the same rows, with those: a whole sample, or a shared prompt and then its responses."""
    start = 0
    for i, group in enumerate(packed_groups):
        before = ((0, common),) if common and i else ()
        end = start + group.prompt + group.own
        if len(group.responses) < 2:
            yield before, [(start, end)]
        else:
            prompt = (start, start + group.prompt)
            yield before, [prompt]
            yield (*before, prompt), list(pairwise(accumulate(group.responses, initial=prompt[1])))
        start = end


def _slots(counts: tuple[int, ...], device: torch.device) -> Tensor | None:
    longest = max(counts)
    if min(counts) == longest:
        return None
    return torch.as_tensor(np.concatenate([i * longest + np.arange(n) for i, n in enumerate(counts)]), device=device)


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, ...] of every rank -> [T, ...] in the order of the micro-batch; backward, the sum of all ranks' gradients of this rank's rows."""
    return _GatherRows.apply(rows, group)


def gather_tokens(values: Tensor, tokens: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """[..., n] of every rank -> [..., N]. All ranks go on to compute the same loss from it, so that backward each keeps what is its own."""
    return _GatherTokens.apply(values, tokens, total, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = dist.get_world_size(group)
        ctx.group, ctx.order = group, [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
        by_rank = rows.new_empty(size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(by_rank, rows.contiguous(), group=group)
        parts = by_rank.chunk(2 * size)
        return torch.cat([parts[ctx.order.index(chunk)] for chunk in range(2 * size)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = grad.chunk(len(ctx.order))
        own = grad.new_empty(2 * len(grad) // len(ctx.order), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, torch.cat([parts[chunk] for chunk in ctx.order]), group=ctx.group)
        return own, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, tokens: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(tokens)
        out = values.new_zeros(*values.shape[:-1], total).index_copy_(-1, tokens, values)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (tokens,) = ctx.saved_tensors
        return grad.index_select(-1, tokens), None, None, None
