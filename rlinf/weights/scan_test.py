"""A scan finds every changed byte, on any device, and names the first tensor that is not finite."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlinf.errors import RunFailed
from rlinf.kernels.cpu import kernels
from rlinf.weights import scan as scans
from rlinf.weights.buckets import fill, layout
from rlinf.weights.scan import checksums, device_checksums, device_sum, fill_and_scan, scan, verify
from rlinf.weights.source import BucketSpec, TensorSpec


def checksum(buffer: torch.Tensor) -> int:
    return checksums(buffer, ())[1]


def test_a_flipped_bit_changes_the_checksum() -> None:
    assert checksum(torch.empty(0, dtype=torch.uint8)) == 0
    data = torch.arange(256, dtype=torch.uint8)
    flipped = data.clone()
    flipped[200] ^= 1
    assert checksum(data) != checksum(flipped)


class Allocations(TorchDispatchMode):
    """The largest storage that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        old = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in old:
            self.largest = max(self.largest, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("nbytes", [0, 4, 64, 1000, 4096, 4099])
def test_a_device_finds_the_checksum_of_a_cpu_without_a_copy_of_the_bucket(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket ends at a word, so that nothing is added; at most a part of its words is there as numbers of 64 bits."""
    monkeypatch.setattr(scans, "WORDS_AT_ONCE", 16)
    buffer = torch.randint(256, (nbytes,), dtype=torch.uint8)
    with Allocations() as seen:
        found = device_sum(buffer)
    assert int(found) % 2**64 == checksum(buffer)
    if nbytes % 4 == 0:
        assert seen.largest <= 16 * 8


def test_a_bucket_is_filled_and_scanned_in_one_pass_and_scanned_again_where_it_arrives() -> None:
    bucket = [
        ("a", torch.randn(40, 8)),
        ("turned", torch.randn(6, 5).t()),
        ("odd", torch.randn(3).bfloat16()),
        ("b", torch.randn(9).half()),
    ]
    bucket[0][1][7, 3] = float("nan")
    specs, nbytes = layout(bucket)
    expected = torch.zeros(nbytes, dtype=torch.uint8)
    fill(expected, specs, bucket)
    buffer = torch.full((nbytes,), 7, dtype=torch.uint8)
    with ThreadPoolExecutor(2) as pool:
        assert fill_and_scan(buffer, specs, bucket, pool).checksum() == checksum(expected)
        assert torch.equal(buffer, expected)
        arrived = scan(buffer, specs, pool)
        assert arrived.checksum() == checksum(expected)
    named = {name for name, _ in bucket} if kernels() else set()  # without compiled code nobody searches for such values here
    assert {*arrived.scanned_for_finite()} - {""} == named
    assert arrived.first_not_finite() == ("a" if kernels() else None)


Checksums = Callable[[torch.Tensor, Sequence[TensorSpec]], tuple[tuple[TensorSpec, ...], int]]


@pytest.mark.parametrize("checksums", [checksums, device_checksums])
def test_the_parts_of_tensors_add_up_and_tell_which_one_changed(checksums: Checksums) -> None:
    bucket = [("a", torch.randn(40, 8)), ("b", torch.randn(3).bfloat16()), ("c", torch.randn(9).half())]
    specs, nbytes = layout(bucket)
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    fill(buffer, specs, bucket)
    expected = checksum(buffer)
    tensors, total = checksums(buffer, specs)
    assert total == expected == sum(t.checksum for t in tensors) % 2**64 and [t[:5] for t in tensors] == [s[:5] for s in specs]
    with ThreadPoolExecutor(2) as pool:
        filled = fill_and_scan(torch.empty_like(buffer), specs, bucket, pool)
        assert filled.checksum() == total and filled.with_checksums(specs) == tensors
    sent = BucketSpec("it", nbytes, tensors, total)
    verify(sent, total, tensors)
    for (name, _), spec in zip(bucket, specs):
        changed = buffer.clone()
        changed[spec.offset + spec.nbytes - 1] ^= 1
        found, received = checksums(changed, specs)
        with pytest.raises(RunFailed, match=f"weight bucket it: tensor {name}, checksum {received:016x} as received, {total:016x} as sent"):
            verify(sent, received, found)


WORDS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=40)


def of_words(words: list[int]) -> torch.Tensor:
    return torch.tensor(words, dtype=torch.int32).view(torch.uint8)


@given(WORDS, st.sampled_from([3, 8, 1 << 22]))
def test_the_checksum_is_the_sum_that_it_says_it_is(words: list[int], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "WORDS_AT_ONCE", at_once)
        assert checksum(of_words(words)) == sum((2 * i + 1) * (x % 2**32) for i, x in enumerate(words)) % 2**64


@given(WORDS, st.data())
def test_a_changed_word_and_two_that_change_places_are_seen(words: list[int], data: st.DataObject) -> None:
    i, j = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    bit = data.draw(st.integers(0, 30))
    changed, swapped = [*words], [*words]
    changed[i] ^= 1 << bit
    swapped[i], swapped[j] = words[j], words[i]
    assert checksum(of_words(changed)) != checksum(of_words(words))
    assert (checksum(of_words(swapped)) == checksum(of_words(words))) == (words[i] == words[j])


def test_the_sign_of_the_last_value_is_seen_to_change_places() -> None:
    """The difference that a sum loses most easily: the highest bit, at a distance of a power of two."""
    far = np.zeros(1 << 16, np.int32)
    far[0] = -(2**31)
    other = far.copy()
    other[0], other[1 << 15] = 0, far[0]
    assert checksum(torch.from_numpy(far).view(torch.uint8)) != checksum(torch.from_numpy(other).view(torch.uint8))
