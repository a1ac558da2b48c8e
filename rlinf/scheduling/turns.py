"""Whose turn it is on devices that actor and engines share: five turns, and which may follow which. Pure functions.

    turn      the actor has                        the engines have
    START     everything                           everything; on GPUs nothing
    SYNC      its weights                          weights, as they arrive
    ROLLOUT   nothing                              weights, KV cache from the first request on
    TRAIN     everything                           nothing
    SAVE      everything                           weights

"Nothing" is what is left on the device after actor.offload_*.
"""

from __future__ import annotations

from enum import Enum

from rlinf.errors import RunFailed


class Turn(Enum):
    START = "start"
    SYNC = "weight sync"
    ROLLOUT = "rollout"
    TRAIN = "training"
    SAVE = "checkpoint"


NEXT = {
    Turn.START: {Turn.SYNC},
    Turn.SYNC: {Turn.ROLLOUT},
    Turn.ROLLOUT: {Turn.TRAIN, Turn.SAVE},
    Turn.TRAIN: {Turn.SYNC},  # the engines have no weights: nothing but new ones wakes them
    Turn.SAVE: {Turn.ROLLOUT},
}
ENGINES_GIVE = {Turn.TRAIN: ("kv", "weights"), Turn.SAVE: ("kv",)}  # before the turn begins


def check_turn(now: Turn, then: Turn) -> None:
    """Raise RunFailed for an order in which actor and engines would both fill the device, or engines would have to generate without
    weights."""
    if then not in NEXT[now]:
        may = " or ".join(sorted(turn.value for turn in NEXT[now]))
        raise RunFailed(f"shared devices: {then.value} cannot follow {now.value}; {may} may")
