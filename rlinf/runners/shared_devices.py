"""Who may use the devices that actor and engines share: the engines give their memory back before the actor takes it (rollout.offload)."""

from __future__ import annotations

from rlinf.runners.engines import Engines
from rlinf.scheduling.turns import ENGINES_GIVE, Turn, check_turn


class SharedDevices:
    """Remembers whose turn it is. offload: the key rollout.offload; without it the engines keep their memory, and turns do not matter."""

    def __init__(self, engines: Engines, offload: bool) -> None:
        self.engines, self.offload = engines, offload
        self.turn = Turn.START

    async def pass_to(self, turn: Turn) -> None:
        """Begin `turn`; returns when the engines have freed what they give up for it.

        The actor frees its part within publish() and release().
        """
        if not self.offload:
            return
        check_turn(self.turn, turn)
        if turn in ENGINES_GIVE:
            await self.engines.ask_all("sleep", ENGINES_GIVE[turn])
        self.turn = turn
