"""Says on the console that functions of the user's own fail; all reasons are in samples/."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence

from rlinf.config.schema import RewardConfig
from rlinf.data.records import GroupHeader, Status

log = logging.getLogger(__name__)


class OwnFailures:
    """Warns when a function of the section `reward` first gives no result, and when it first gives none for all groups of one tell(): each
    once."""

    def __init__(self, reward: RewardConfig) -> None:
        self.reward = reward
        self._told: set[tuple[str, bool]] = set()

    def tell(self, headers: Sequence[GroupHeader], where: str) -> None:
        """headers: judged groups. where: what they are of, such as `step 3`."""
        called, failed = Counter[str](), defaultdict[str, list[str]](list)
        for header in headers:
            for verdict in header.judged:
                called.update(self._part(name.removeprefix("own/")) for name, _ in verdict.parts if name.startswith("own/"))
                for name, why in verdict.failed:
                    failed[self._part(name)].append(why)
                if header.task in self.reward.own_tasks and verdict.extracted is not None:
                    called[task := f"reward.own_tasks {header.task}"] += 1
                    if verdict.status is Status.UNDECIDED and verdict.route != "own":
                        failed[task].append(verdict.reason or verdict.route)
        for name, whys in failed.items():
            everywhere = len(whys) == called[name]
            if not self._told & {(name, everywhere), (name, True)}:
                self._told.add((name, everywhere))
                counts = "so they are UNDECIDED" if name.startswith("reward.own_tasks") else "so its part is 0"
                share = f"all {called[name]}" if everywhere else f"{len(whys)} of {called[name]}"
                log.warning("%s: %s failed for %s responses, %s: %s", where, name, share, counts, whys[0])

    def _part(self, name: str) -> str:
        return f"reward.own_group_parts {name}" if name in self.reward.own_group_parts else f"reward.own_parts {name}"
