"""The split of a micro-batch over context-parallel ranks: every row once, behind the rows that it may see and no others,
work in equal parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlinf.training.context import Piece, Range, chunks_of, plan_pieces, row_multiple, share_of
from rlinf.training.packed_batch import PackedBatch, PackedGroup

CPU = torch.device("cpu")
SEGMENTS = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 7), max_size=5)), min_size=1, max_size=5)


def padded(shapes: list[tuple[int, list[int]]], common: int, multiple: int) -> list[PackedGroup]:
    packed_groups = [PackedGroup(common, ())] * bool(common) + [PackedGroup(prompt, tuple(counts)) for prompt, counts in shapes]
    padding = -sum(s.prompt + s.own for s in packed_groups) % multiple
    return packed_groups + [PackedGroup(padding, ())] * bool(padding)


def chunks(rank: int, size: int, total: int) -> list[Range]:
    length = total // (2 * size)
    return [(i * length, (i + 1) * length) for i in chunks_of(rank, size)] if size > 1 else [(0, total)]


def seen(pieces: tuple[Piece, ...], atoms: tuple[int, ...]) -> list[list[int]]:
    """The rows that each row of the pieces attends to, in order, itself last; as PackedAttention reads them."""
    ends = np.cumsum((0, *atoms)).tolist()
    rows_of = lambda names: [row for i in names for row in range(ends[i], ends[i + 1])]
    found = []
    for piece in pieces:
        prefix, own = rows_of(piece.prefix), rows_of(piece.own)
        if not piece.responses:
            keys = prefix + own
            found += [keys[: len(keys) - piece.rows + i + 1] for i in range(piece.rows)]
            continue
        slots = list(range(piece.rows)) if piece.slots is None else piece.slots.tolist()
        assert sum(piece.responses) == piece.rows == len(own) == len(slots)
        grid = dict(zip(slots, own))
        for i, count in enumerate(piece.responses):
            response = [grid[i * piece.longest + t] for t in range(count)]
            found += [prefix + response[: t + 1] for t in range(count)]
    return found


def may_see(packed_groups: list[PackedGroup], common: int) -> list[list[int]]:
    """The same, read off the groups."""
    found, start = [], 0
    for i, group in enumerate(packed_groups):
        before = list(range(common)) if i else []
        prompt = list(range(start, start + group.prompt))
        found += [before + prompt[: t + 1] for t in range(group.prompt)]
        first = start + group.prompt
        for count in group.responses:
            found += [before + prompt + list(range(first, first + t + 1)) for t in range(count)]
            first += count
        start = first
    return found


@given(shapes=SEGMENTS, common=st.sampled_from([0, 5]), size=st.sampled_from([1, 2, 3, 4]))
def test_each_row_is_computed_once_and_sees_what_is_before_it(shapes: list[tuple[int, list[int]]], common: int, size: int) -> None:
    packed_groups = padded(shapes, common, row_multiple(size))
    expected = may_see(packed_groups, common)
    found: dict[int, list[int]] = {}
    for rank in range(size):
        mine = chunks(rank, size, len(expected))
        pieces, atoms = plan_pieces(packed_groups, common, mine, CPU)
        rows = [row for first, last in mine for row in range(first, last)]
        assert sum(atoms) == len(expected)
        found |= dict(zip(rows, seen(pieces, atoms), strict=True))
    assert [found[row] for row in range(len(expected))] == expected


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_long_sequence_costs_every_rank_the_same(size: int) -> None:
    packed_groups, total = [PackedGroup(32 * size, ())], 32 * size
    costs = [sum(map(len, seen(*plan_pieces(packed_groups, 0, chunks(rank, size, total), CPU)))) for rank in range(size)]
    assert len(set(costs)) == 1


def batch_of(packed_groups: list[PackedGroup], predict: list[int]) -> PackedBatch:
    total, n = sum(s.prompt + s.own for s in packed_groups), len(predict)
    return PackedBatch(
        token_ids=torch.arange(total) + 100,
        positions=torch.arange(total),
        packed_groups=tuple(packed_groups),
        predict_rows=torch.tensor(predict),
        targets=torch.zeros(n, dtype=torch.int64),
        sample_N=torch.zeros(n, dtype=torch.int64),
        advantages_N=torch.zeros(n),
        loss_mask_N=torch.ones(n),
        rollout_logprobs_N=torch.zeros(n),
        n_samples=1,
        sample_ids=("s",),
        common=0,
        temperature=1.0,
    )


def test_each_response_token_is_predicted_on_the_rank_that_has_its_row() -> None:
    batch = batch_of([PackedGroup(5, (2, 4)), PackedGroup(1, ())], [4, 5, 6, 4, 7, 8, 9, 10])
    tokens: list[int] = []
    for rank in range(3):
        share = share_of(batch, rank, 3)
        assert len(share.token_ids) == 4 and torch.equal(share.token_ids, share.positions + 100)
        assert torch.equal(share.positions[share.predict_rows], batch.predict_rows[share.tokens])
        tokens += share.tokens.tolist()
    assert sorted(tokens) == list(range(8))
    alone: Any = share_of(batch, 0, 1)
    assert alone.tokens is None and alone.token_ids is batch.token_ids and alone.predict_rows is batch.predict_rows


def test_rows_that_make_no_equal_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="13 rows are not a multiple of 4: pack with the engine's pad_to"):
        share_of(batch_of([PackedGroup(13, ())], [0]), 0, 2)
