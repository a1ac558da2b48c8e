"""A phase has one name in metrics and messages, but for two of them, and says itself whether it may last as long as it likes."""

from __future__ import annotations

import pytest

from rlinf.cluster.phase import RESUME, START, Phase


@pytest.mark.parametrize(
    ("phase", "shown", "word"),
    [
        (START, "start", "start"),
        (RESUME, "start, resume", "resume"),
        (Phase("evaluation"), "evaluation", "evaluation"),
        (Phase("rollout", 3), "step 3, rollout", "rollout"),
        (Phase("sync_weights", 0), "step 0, weight sync", "weight sync"),
        (Phase("validate", 3), "step 3, validation", "validation"),
    ],
)
def test_what_people_read(phase: Phase, shown: str, word: str) -> None:
    assert (str(phase), phase.word) == (shown, word)


def test_only_the_start_has_no_budget() -> None:
    assert not START.has_budget and RESUME.has_budget and Phase("rollout", 1).has_budget
