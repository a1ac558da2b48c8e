"""A weight sync that did not arrive whole, or arrived somewhere else, ends the run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlinf.errors import RunFailed
from rlinf.weights.receipts import TOLERANCE, check_probes, check_receipts, merge_sources
from rlinf.weights.source import BucketSpec, Receipt, SharedMemory, TensorSpec


def bucket(key: str, checksum: int, names: str) -> BucketSpec:
    return BucketSpec(key, 4 * len(names), tuple(TensorSpec(n, "float32", (1,), 4 * i, 4) for i, n in enumerate(names)), checksum)


STAGES = SharedMemory((bucket("s0-0", 11, "ab"), bucket("s0-1", 12, "c"))), SharedMemory((bucket("s1-0", 13, "d"),))
SOURCE = merge_sources(STAGES)
GOOD = Receipt(
    version=3, checksums={"s0-0": 11, "s0-1": 12, "s1-0": 13}, n_tensors=4, nbytes=16, seconds=0.1, engine_tensors={"q": "7", "k": "9"}
)


def test_a_source_of_several_stages_is_all_their_buckets_in_order() -> None:
    assert [b.key for b in SOURCE.buckets] == ["s0-0", "s0-1", "s1-0"]


def test_receipts_of_what_was_sent_are_good() -> None:
    check_receipts([SOURCE, SOURCE], 3, [GOOD, GOOD])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "weight sync 3: rollout rank 1 reports version 2 and 4 tensors; 4 were sent"),
        ({"n_tensors": 3}, "weight sync 3: rollout rank 1 reports version 3 and 3 tensors; 4 were sent"),
        (
            {"checksums": {"s0-0": 11, "s0-1": 99, "s1-0": 13}},
            "weight sync 3: rollout rank 1 received other bytes than were sent in bucket s0-1 .tensors c to c.",
        ),
        (
            {"checksums": {"s0-0": 11, "s0-1": 12}},
            "weight sync 3: rollout rank 1 received other bytes than were sent in bucket s1-0 .tensors d to d.",
        ),
        (
            {"engine_tensors": {"q": "7", "k": "8"}},
            "weight sync 3: rollout ranks 0 and 1 hold different weights .*own checksums, first in k",
        ),
        ({"engine_tensors": {"q": "7"}}, "own checksums, first in k"),
        ({"engine_tensors": {"q": "7", "k": "9", "v": "1"}}, "own checksums, first in v"),
    ],
)
def test_a_receipt_of_anything_else_names_rank_and_bucket(change: dict[str, object], message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        check_receipts([SOURCE, SOURCE], 3, [GOOD, replace(GOOD, **change)])


def test_the_largest_gap_over_probes_and_engines_is_reported() -> None:
    trainer = [np.array([-1.0, -2.0]), np.array([-3.0])]
    near = [np.array([-1.00002, -2.0]), np.array([-3.0])]
    assert check_probes(1, "fp32", trainer, [trainer, near]) == pytest.approx(2e-5)
    assert check_probes(1, "fp32", trainer, []) == 0.0


@pytest.mark.parametrize("precision", TOLERANCE)
def test_an_engine_that_runs_other_weights_ends_the_run(precision: str) -> None:
    trainer = [np.array([-1.0]), np.array([-3.0, -4.0])]
    other = [trainer[0], trainer[1] + np.array([0.0, 1.01 * TOLERANCE[precision]])]
    with pytest.raises(RunFailed, match="on probe 1 rollout rank 1 differs from the actor .* does not run the actor's weights"):
        check_probes(7, precision, trainer, [trainer, other])


def test_nan_is_never_within_the_tolerance_and_no_probe_may_be_missing() -> None:
    trainer = [np.array([-1.0]), np.array([-2.0])]
    with pytest.raises(RunFailed, match="on probe 0"):
        check_probes(1, "bf16", trainer, [[np.array([np.nan]), trainer[1]]])
    with pytest.raises(ValueError):
        check_probes(1, "bf16", trainer, [trainer[:1]])
    with pytest.raises(RunFailed, match="probe 0 has 1 scores of the actor, 2 of rollout rank 0"):
        check_probes(1, "bf16", trainer, [[np.array([-1.0, -1.0]), trainer[1]]])
