"""Buckets keep every byte of every tensor, in order, and never mix one up."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlinf.weights import buckets
from rlinf.weights.buckets import ALIGNMENT, aligned, checksum, device_checksum, fill, group_into_buckets, layout, views

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), max_size=12), st.integers(1, 600))
def test_every_tensor_comes_back_bit_equal_and_in_order(shapes: list[tuple[list[int], torch.dtype]], bucket_bytes: int) -> None:
    tensors = [(f"t{i}", (torch.randn(shape) * 9).to(dtype)) for i, (shape, dtype) in enumerate(shapes)]
    back = []
    for bucket in group_into_buckets(iter(tensors), bucket_bytes):
        specs, nbytes = layout(bucket)
        assert nbytes <= max(bucket_bytes, aligned(bucket[0][1].nbytes)) and all(s.offset % ALIGNMENT == 0 for s in specs)
        assert nbytes <= bucket_bytes or len([t for _, t in bucket if t.nbytes]) == 1
        buffer = torch.zeros(nbytes, dtype=torch.uint8)
        fill(buffer, specs, bucket)
        back += list(views(buffer, specs))
    assert [n for n, _ in back] == [n for n, _ in tensors]
    assert all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for (_, a), (_, b) in zip(back, tensors))


def test_tensors_that_are_not_contiguous_are_packed_by_value() -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    specs, nbytes = layout([("t", tensor)])
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    fill(buffer, specs, [("t", tensor)])
    assert torch.equal(dict(views(buffer, specs))["t"], tensor)


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
    monkeypatch.setattr(buckets, "WORDS_AT_ONCE", 16)
    buffer = torch.randint(256, (nbytes,), dtype=torch.uint8)
    with Allocations() as seen:
        found = device_checksum(buffer)
    assert found == checksum(buffer)
    if nbytes % 4 == 0:
        assert seen.largest <= 16 * 8
