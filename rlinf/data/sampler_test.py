"""Laws of the prompt stream."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlinf.data.sampler import PromptSampler, epoch_order
from rlinf.errors import UserError

shapes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
seeds = st.integers(0, 2**63 - 1)


@given(shapes, st.booleans(), seeds, st.integers(1, 5))
def test_every_prompt_is_seen_once_an_epoch(shape: tuple[int, int], shuffle: bool, seed: int, epochs: int) -> None:
    n, batch_size = shape
    sampler = PromptSampler(n, batch_size, shuffle, seed)
    stream = [i for _ in range(n * epochs // batch_size + 1) for i in sampler.next_batch()]
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(shapes, st.booleans(), seeds, st.integers(0, 12), st.integers(1, 12))
def test_a_restored_sampler_goes_on_as_if_never_stopped(shape: tuple[int, int], shuffle: bool, seed: int, before: int, after: int) -> None:
    first = PromptSampler(*shape, shuffle, seed)
    for _ in range(before):
        first.next_batch()
    second = PromptSampler(*shape, shuffle, seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.next_batch() for _ in range(after)] == [first.next_batch() for _ in range(after)]
    assert (second.epoch, second.cursor) == (first.epoch, first.cursor)


@given(shapes, st.booleans(), seeds, st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), max_size=6))
def test_what_is_given_back_comes_next(shape: tuple[int, int], shuffle: bool, seed: int, rounds: list[tuple[int, int]]) -> None:
    """However much of each batch is given back, over ends of epochs too, the stream of used prompts is the one without giving back."""
    sampler, plain = PromptSampler(*shape, shuffle, seed), PromptSampler(shape[0], 1, shuffle, seed)
    used: list[int] = []
    for size, back in rounds:
        back = min(size, back)
        used += sampler.next_batch(size)[: size - back]
        sampler.give_back(back)
        resumed = PromptSampler(*shape, shuffle, seed)
        resumed.load_state_dict(sampler.state_dict())
        assert resumed.next_batch(3) == sampler.next_batch(3)
        sampler.give_back(3)
    assert used == [i for _ in used for i in plain.next_batch()] and sampler.handed_out == len(used)


@given(st.integers(2, 30), seeds, st.integers(1, 20))
def test_the_batch_size_may_change_on_resume(n: int, seed: int, steps: int) -> None:
    ones, pairs = PromptSampler(n, 1, True, seed), PromptSampler(n, 2, True, seed)
    stream = [i for _ in range(steps) for i in ones.next_batch()]
    pairs.load_state_dict(ones.state_dict())
    stream += [i for _ in range(steps) for i in pairs.next_batch()]
    reference = PromptSampler(n, 1, True, seed)
    assert stream == [i for _ in range(3 * steps) for i in reference.next_batch()]


@given(shapes, seeds, st.integers(1, 9), st.integers(-1, 50))
def test_total_steps_never_needs_more_prompts_than_the_epochs_hold(shape: tuple[int, int], seed: int, epochs: int, max_steps: int) -> None:
    n, batch_size = shape
    steps = PromptSampler(n, batch_size, True, seed).total_steps(epochs, max_steps)
    assert steps * batch_size <= n * epochs
    sampler = PromptSampler(n, batch_size, True, seed)
    for _ in range(n * epochs // batch_size):
        assert not sampler.exhausted(epochs)
        sampler.next_batch()
    assert sampler.exhausted(epochs)
    assert steps == max_steps or (steps + 1) * batch_size > n * epochs


@given(st.integers(2, 30), seeds, st.integers(0, 9), st.integers(1, 3), st.data())
def test_the_steps_that_are_left_are_counted_in_prompts(n: int, seed: int, done: int, epochs: int, data: st.DataObject) -> None:
    """`waiting` of the prompts are on their way to a step: after the last step less than a batch is over, whatever the batches were."""
    sampler, batch_size = PromptSampler(n, data.draw(st.integers(1, n)), True, seed), data.draw(st.integers(1, n))
    handed_out = sampler.next_batch(data.draw(st.integers(0, n * epochs)))
    waiting = data.draw(st.integers(0, len(handed_out)))
    sampler.batch_size = batch_size
    total = sampler.total_steps(epochs, -1, done, waiting)
    assert 0 <= n * epochs - len(handed_out) + waiting - (total - done) * batch_size < batch_size
    assert sampler.total_steps(epochs, done + 1, done, waiting) == min(total, done + 1)


def test_the_order_is_fixed_for_all_time() -> None:
    assert epoch_order(8, True, 1234, 0).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]
    assert epoch_order(8, True, 1234, 1).tolist() == [0, 5, 6, 4, 2, 1, 7, 3]
    assert epoch_order(4, False, 1234, 7).tolist() == [0, 1, 2, 3]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = Counter(tuple(epoch_order(50, True, seed, epoch)) for seed in range(5) for epoch in range(5))
    assert len(orders) == 25


@pytest.mark.parametrize("change, said", [
    ({"n": 9}, "number of training prompts"), ({"seed": 2}, "data.seed"), ({"shuffle": False}, "data.shuffle"),
    ({"fingerprint": "b"}, "training data"),
])  # fmt: skip
def test_a_state_of_other_data_is_refused(change: dict, said: str) -> None:
    made = {"n": 8, "batch_size": 2, "shuffle": True, "seed": 1, "fingerprint": "a"}
    state = PromptSampler(**made).state_dict()
    with pytest.raises(UserError, match=said):
        PromptSampler(**made | change).load_state_dict(state)


def test_too_few_prompts_for_a_batch() -> None:
    with pytest.raises(UserError, match=r"rollout_batch_size is 8, but .* only 3 prompts"):
        PromptSampler(3, 8, True, 1)


@pytest.mark.parametrize(("seed", "said"), [(-1, "is negative"), (2**63, "is too large"), (2**64, "is too large")])
def test_a_seed_that_numpy_cannot_tell_from_others_is_refused(seed: int, said: str) -> None:
    with pytest.raises(UserError, match=f"data.seed: {seed} {said}; use 0 or more, and less than {2**63}"):
        PromptSampler(8, 4, True, seed)
    assert epoch_order(50, True, 2**63 - 1, 1).tolist() != epoch_order(50, True, 2**63 - 2, 1).tolist()
