"""The reference policy is the policy as it started, and looking at it leaves the actor's bits alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlinf.training.reference import ReferencePolicy
from tests.training_ranks import build, logprobs, minibatches, snapshot, update


def swap(at: Any, folder: Path, precision: str) -> dict[str, Any]:
    engine = build(at, folder, precision=precision)
    twin = build(at, folder, precision=precision)
    first, second = minibatches(engine)
    reference = ReferencePolicy(engine)
    start = logprobs(engine, second[0])
    for e in (engine, twin):
        update(e, first)
    before = snapshot(engine)
    with reference.swapped_in():
        inside = logprobs(engine, second[0])
    restored = snapshot(engine) == before
    with pytest.raises(ZeroDivisionError), reference.swapped_in():
        raise ZeroDivisionError
    restored = restored and snapshot(engine) == before
    now = logprobs(engine, second[0])
    for e in (engine, twin):
        update(e, second)
    stack = lambda values: None if values is None else torch.cat(values).numpy()
    out = {
        "start": stack(start),
        "inside": stack(inside),
        "now": stack(now),
        "restored": restored,
        "as if never looked at": snapshot(engine) == snapshot(twin),
    }
    return out


@pytest.mark.parametrize(("precision", "layout"), [("fp32", (1, 1, 1)), ("bf16", (4, 2, 2))])
def test_the_reference_is_the_start_and_a_look_at_it_changes_nothing(
    rank_pool: Any, tiny_models: dict[str, Path], precision: str, layout: tuple[int, int, int]
) -> None:
    ranks = rank_pool.run(swap, tiny_models["qwen2-tied"], precision, ranks=layout[0], tp=layout[1], pp=layout[2])
    for rank in ranks:
        assert rank["restored"] and rank["as if never looked at"]
    assert np.array_equal(ranks[-1]["inside"], ranks[-1]["start"])  # bit for bit
    assert np.abs(ranks[-1]["now"] - ranks[-1]["start"]).max() > 1e-3
