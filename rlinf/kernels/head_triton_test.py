"""The head by Triton's kernels, interpreted on CPU, passes the tests of the head; tests/test_head_triton.py brings Triton."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest

from rlinf.training.logprobs_test import ROWS, assemble, extreme, parallel, plain, problem

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="tests/test_head_triton.py runs it with Triton, interpreted",
)


def by_kernels(at: Any, function: Any, *args: Any) -> dict[str, np.ndarray]:
    """In a rank. Blocks of 64 columns, so that a row has several and the last is not full."""
    from rlinf.kernels import head_triton
    from rlinf.training import logprobs

    logprobs._fused, head_triton.BLOCK = (lambda device: head_triton), 64
    return function(at, *args)


@pytest.mark.parametrize("tp", [1, 2])
def test_values_and_gradients_are_those_of_log_softmax(rank_pool: Any, tp: int) -> None:
    for with_entropy, chunk_rows in ((False, ROWS), (True, 15)):
        ranks = rank_pool.run(by_kernels, parallel, problem(), 0.6, with_entropy, chunk_rows, ranks=tp, tp=tp)
        for name, want in plain(problem(), 0.6, with_entropy).items():
            np.testing.assert_allclose(assemble(ranks)[name], want, rtol=1e-5, atol=1e-5, err_msg=f"{name}, {with_entropy}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_differs_only_by_its_rounding(rank_pool: Any, dtype: str) -> None:
    (got,) = rank_pool.run(by_kernels, parallel, problem(), 1.0, True, 5, dtype, ranks=1)
    for name, value in plain(problem(), 1.0, True).items():
        assert np.abs(got[name] - value).max() < 0.03 * max(1.0, np.abs(value).max()), name


def test_extreme_logits_stay_finite(rank_pool: Any) -> None:
    (got,) = rank_pool.run(by_kernels, extreme, ranks=1)
    assert got["logprob"].tolist() == [0.0, -2000.0] and got["entropy"].tolist() == [0.0, 0.0] and np.isfinite(got["grad"]).all()


def only_padding(at: Any) -> tuple[list[float], list[list[float]], list[list[float]]]:
    import torch

    from rlinf.kernels.head_triton import head_back, head_sums

    logits, columns, one = torch.ones(2, 40), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2)
    top, sums = head_sums(logits, columns, 1.0, 0)
    head_back(logits, columns, torch.tensor([False, False]), one, one, one, one, 1.0, 0)
    return top.tolist(), sums[::2].tolist(), logits.tolist()


def test_a_shard_of_padding_alone_adds_nothing(rank_pool: Any) -> None:
    (found,) = rank_pool.run(only_padding, ranks=1)
    assert found == ([float(np.float32(-1e30))] * 2, [[0.0] * 2] * 2, [[0.0] * 40] * 2)
