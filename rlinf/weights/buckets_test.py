"""Buckets keep every byte of every tensor, in order, and never mix one up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinf.weights.buckets import ALIGNMENT, aligned, fill, group_into_buckets, layout, views

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
