"""The base of the workers around a Megatron engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rlinf.data.examples import example
from rlinf.data.packing import RankBatch
from rlinf.workers.actor import ActorWorker
from rlinf.workers.critic import CriticWorker
from rlinf.workers.megatron import MegatronWorker
from rlinf.workers.sft import SftWorker
from rlinf.workers.token_reward import TokenRewardWorker


@pytest.mark.parametrize("kind", [ActorWorker, CriticWorker, TokenRewardWorker, SftWorker])
def test_groups_that_the_plan_does_not_name_in_this_order_are_refused(kind: type[MegatronWorker]) -> None:
    tokens = np.ones(3, np.int32)
    a, b = (example(name, tokens, tokens) for name in "ab")
    for came in ([b, a], [a], [a, b, b]):
        with pytest.raises(ValueError, match=r"payloads do not match the plan: .* came for \['a', 'b'\]"):
            kind.__new__(kind).pack(RankBatch(("a", "b"), ()), came)


def test_a_checkpoint_that_nobody_began_is_not_finished_in_silence() -> None:
    worker = ActorWorker.__new__(ActorWorker)
    worker.role, worker.address, worker.bring_back = "actor", SimpleNamespace(rank=1), lambda: None
    with pytest.raises(RuntimeError, match="actor rank 1: no checkpoint is being written"):
        worker.finish_save()
