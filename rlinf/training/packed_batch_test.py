"""pack(): which token stands in which row, at which position, and which row predicts which token."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlinf.data.packing import SampleRef
from rlinf.data.records import Finish, Group, Prompt, Sample
from rlinf.training.context import share_of
from rlinf.training.packed_batch import COMMON_MIN, PackedBatch, pack

CPU = torch.device("cpu")


def group(name: str, prompt: list[int], responses: list[list[int]]) -> Group:
    samples = tuple(
        Sample(
            f"{name}/{i}",
            np.array(r, np.int32),
            np.array(r, np.float32) / 10,
            np.arange(len(r)).astype(np.uint8) % 2,
            ((0, len(r)),),
            Finish.STOP,
        )
        for i, r in enumerate(responses)
    )
    return Group(name, Prompt(name, np.array(prompt, np.int32), "math", ("",)), samples)


def packed(groups: list[Group], refs: list[SampleRef], share_prefix: bool = True, pad_to: int = 1) -> PackedBatch:
    return pack(groups, refs, share_prefix=share_prefix, temperature=1.0, pad_to=pad_to, device=CPU)


def everything(groups: list[Group]) -> list[SampleRef]:
    return [SampleRef(g, i, g + i / 10) for g, group in enumerate(groups) for i in range(len(group.samples))]


def history(batch: PackedBatch, row: int) -> list[int]:
    """The tokens that a row can see, read off the groups alone, itself last."""
    start, common = 0, list(range(batch.common))
    for number, group in enumerate(batch.packed_groups):
        prompt = list(range(start, start + group.prompt))
        seen = (common if batch.common and number else []) + prompt
        if row in prompt:
            return batch.token_ids[[r for r in seen if r <= row]].tolist()
        first = start + group.prompt
        for count in group.responses:
            if first <= row < first + count:
                return batch.token_ids[seen + list(range(first, row + 1))].tolist()
            first += count
        start = first
    raise AssertionError(f"row {row} is in no group")


GROUPS = [group("a", [1, 2, 3], [[10, 11, 12], [20], [30, 31]]), group("b", [7], [[40, 41]])]


def test_the_rows_of_a_shared_prompt() -> None:
    batch = packed(GROUPS, everything(GROUPS))
    # the last token of a response is predicted but predicts nothing: it has no row
    assert batch.token_ids.tolist() == [1, 2, 3, 10, 11, 30, 7, 40]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert batch.targets.tolist() == [10, 11, 12, 20, 30, 31, 40, 41]
    assert batch.predict_rows.tolist() == [2, 3, 4, 2, 2, 5, 6, 7]
    assert batch.sample_N.tolist() == [0, 0, 0, 1, 2, 2, 3, 3] and batch.n_samples == 4
    assert batch.advantages_N.tolist() == np.float32([0, 0, 0, 0.1, 0.2, 0.2, 1, 1]).tolist()
    assert batch.loss_mask_N.tolist() == [0, 1, 0, 0, 0, 1, 0, 1]
    assert batch.rollout_logprobs_N.tolist() == np.float32([1, 1.1, 1.2, 2, 3, 3.1, 4, 4.1]).tolist()
    assert [(s.prompt, s.responses) for s in batch.packed_groups] == [(3, (2, 0, 1)), (1, (1,))]
    assert [(p.rows, p.prefix, p.own, p.responses) for p in share_of(batch, 0, 1).pieces] == [
        (3, (), (0,), ()),
        (3, (0,), (1,), (2, 1)),
        (2, (), (2,), ()),
    ]
    assert batch.attended_pairs == sum(len(history(batch, row)) for row in range(8))


def test_attended_pairs_behind_a_common_start() -> None:
    start = list(range(100, 100 + COMMON_MIN))
    groups = [group("a", [*start, 1, 2], [[10, 11, 12], [20, 21]]), group("b", [*start, 7], [[40, 41]])]
    batch = packed(groups, everything(groups))
    assert batch.common == COMMON_MIN and batch.attended_pairs == sum(len(history(batch, row)) for row in range(len(batch.token_ids)))


def test_the_rows_when_every_sample_has_its_own_prompt() -> None:
    batch = packed(GROUPS, everything(GROUPS), share_prefix=False)
    assert batch.token_ids.tolist() == [1, 2, 3, 10, 11, 1, 2, 3, 1, 2, 3, 30, 7, 40]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.predict_rows.tolist() == [2, 3, 4, 7, 10, 11, 12, 13]
    assert all(not p.responses for p in share_of(batch, 0, 1).pieces)


@given(
    prompts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    responses=st.data(),
    share_prefix=st.booleans(),
    pad_to=st.integers(1, 4),
    common=st.sampled_from([0, COMMON_MIN - 1, COMMON_MIN, COMMON_MIN + 3]),
)
def test_every_token_is_predicted_from_exactly_its_own_history(
    prompts: list[int], responses: st.DataObject, share_prefix: bool, pad_to: int, common: int
) -> None:
    """The log-probability of token t comes from position P + t - 1 of its own sequence (token alignment rule)."""
    token = iter(range(100, 10_000))
    groups = []
    for g, length in enumerate(prompts):
        lengths = responses.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        prompt = list(range(common)) + [next(token) for _ in range(length)]
        groups.append(group(f"g{g}", prompt, [[next(token) for _ in range(n)] for n in lengths]))
    refs = responses.draw(st.permutations(everything(groups)))
    batch = packed(groups, refs, share_prefix, pad_to)
    assert len(batch.token_ids) % pad_to == 0 == len(batch.token_ids) - len(batch.positions)
    assert sum(s.prompt + s.own for s in batch.packed_groups) == len(batch.token_ids)
    at = 0
    for sample_number in range(batch.n_samples):
        tokens = batch.targets[batch.sample_N == sample_number].tolist()
        (ref,) = [r for r in refs if groups[r.group].samples[r.index].token_ids.tolist() == tokens]
        prompt = groups[ref.group].prompt.token_ids.tolist()
        for t in range(len(tokens)):
            row = batch.predict_rows[at + t].item()
            assert batch.positions[row] == len(prompt) + t - 1
            assert history(batch, row) == prompt + tokens[:t]
        assert set(batch.advantages_N[batch.sample_N == sample_number].tolist()) == {np.float32(ref.advantage).item()}
        at += len(tokens)
    assert at == len(batch.targets)
    if share_prefix:  # each distinct token once
        rows = batch.token_ids[: len(batch.token_ids) - padding(batch)].tolist()
        own = [t for t in rows if t >= 100]
        assert len(own) == len(set(own))


def padding(batch: PackedBatch) -> int:
    last = batch.packed_groups[-1]
    return last.prompt if not last.responses and len(batch.packed_groups) > bool(batch.common) else 0


def test_a_start_that_all_prompts_share_is_packed_once() -> None:
    start = list(range(200, 200 + COMMON_MIN))
    groups = [group("a", [*start, 1], [[10, 11]]), group("b", [*start, 2, 3], [[20], [30, 31]])]
    batch = packed(groups, everything(groups))
    assert batch.common == COMMON_MIN
    assert batch.token_ids.tolist() == [*start, 1, 10, 2, 3, 30]
    assert batch.positions.tolist() == [*range(COMMON_MIN), COMMON_MIN, COMMON_MIN + 1, COMMON_MIN, COMMON_MIN + 1, COMMON_MIN + 2]
    alone = packed(groups, [SampleRef(1, 0, 0.0), SampleRef(1, 1, 0.0)])
    assert alone.common == 0  # one prompt shares nothing with itself


def test_an_identical_prompt_of_two_groups_keeps_its_last_token() -> None:
    start = list(range(COMMON_MIN + 1))
    groups = [group("a", start, [[10, 11]]), group("b", start, [[20, 21]])]
    batch = packed(groups, everything(groups))
    assert batch.common == COMMON_MIN  # each prompt's last row predicts its own responses
    assert batch.token_ids.tolist() == [*start, 10, start[-1], 20]


def test_padding_is_inert_and_an_empty_micro_batch_is_only_padding() -> None:
    batch = packed(GROUPS, everything(GROUPS), pad_to=3)
    assert len(batch.token_ids) == 9 and batch.packed_groups[-1].prompt == 1 and batch.packed_groups[-1].responses == ()
    assert 8 not in batch.predict_rows.tolist()
    for pad_to in (1, 4):
        empty = packed(GROUPS, [], pad_to=pad_to)
        assert (
            len(empty.token_ids) == pad_to
            and len(empty.targets) == len(empty.predict_rows) == len(empty.advantages_N) == empty.n_samples == 0
        )
        assert empty.targets.dtype == empty.predict_rows.dtype == torch.int64 and empty.advantages_N.dtype == torch.float32
