"""The hand-over on devices that actor and engines share: engines give memory back before the actor takes it (rollout.offload)."""

from __future__ import annotations

from rlinf.runners.engines import Engines
from rlinf.scheduling.turns import ENGINES_GIVE, Turn, check_turn


class SharedDevices:
    """offload: rollout.offload; without it the engines keep what they have, and who may follow whom is not asked."""

    def __init__(self, engines: Engines, offload: bool) -> None:
        self.engines, self.offload = engines, offload
        self.turn = Turn.START

    async def pass_to(self, turn: Turn) -> None:
        """Return when what the engines give up for `turn` is free.

        What the actor gives up it gives as a part of publish() and release().
        """
        if not self.offload:
            return
        check_turn(self.turn, turn)
        if turn in ENGINES_GIVE:
            await self.engines.ask_all("sleep", ENGINES_GIVE[turn])
        self.turn = turn
