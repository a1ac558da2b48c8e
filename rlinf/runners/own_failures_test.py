"""A function of the user's own that fails is told once, and once more when it fails everywhere."""

from __future__ import annotations

import pytest

from rlinf.config.schema import RewardConfig
from rlinf.data.records import Finish, GroupHeader, Status, Verdict
from rlinf.runners.own_failures import OwnFailures

PARTS = (("own/short", 0.0), ("own/steps", 0.0), ("format", 1.0))


def part(*failed: tuple[str, str]) -> Verdict:
    return Verdict(0.0, Status.RIGHT, "1", "number", 0.0, parts=PARTS, failed=failed)


def group(*verdicts: Verdict, task: str = "math") -> GroupHeader:
    n, sizes = len(verdicts), (3,) * len(verdicts)
    return GroupHeader("g", "p", task, 4, tuple(map(str, range(n))), sizes, sizes, (Finish.STOP,) * n, (((0, 3),),) * n, verdicts)


def test_a_part_is_told_when_it_first_fails_and_when_it_first_fails_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    failures, broken = OwnFailures(RewardConfig()), ("short", "KeyError: 'x' (fns.py:14)")
    failures.tell([group(part(), part())], "step 1")
    assert not caplog.messages
    for _ in range(2):
        failures.tell([group(part(), part(broken)), group(part(broken))], "step 2")
        failures.tell([group(part(broken), part(broken, ("steps", "no result")))], "step 3")
    assert caplog.messages == [
        "step 2: reward.own_parts short failed for 2 of 3 responses, so its part is 0: KeyError: 'x' (fns.py:14)",
        "step 3: reward.own_parts short failed for all 2 responses, so its part is 0: KeyError: 'x' (fns.py:14)",
        "step 3: reward.own_parts steps failed for 1 of 2 responses, so its part is 0: no result",
    ]


def test_a_part_of_a_whole_group_is_told_by_its_own_key(caplog: pytest.LogCaptureFixture) -> None:
    broken = ("steps", "OSError: no answer (fns.py:3)")
    failures = OwnFailures(RewardConfig(own_parts={"short": "fns.py:short"}, own_group_parts={"steps": "fns.py:steps"}))
    failures.tell([group(part(broken), part(broken))], "step 1")
    assert caplog.messages == [
        "step 1: reward.own_group_parts steps failed for all 2 responses, so its part is 0: OSError: no answer (fns.py:3)"
    ]


def test_a_judge_that_fails_is_told_but_not_one_that_cannot_tell(caplog: pytest.LogCaptureFixture) -> None:
    def verdict(route: str, reason: str, status: Status = Status.UNDECIDED) -> Verdict:
        return Verdict(0.0, status, "1", route, 0.0, reason)

    unsure, failed = verdict("own", ""), verdict("own_failed", "NameError: y (fns.py:3)")
    OwnFailures(RewardConfig(own_tasks={"odd": "fns.py:odd"})).tell(
        [group(unsure, failed, task="odd"), group(failed, task="math")], "step 4, validation"
    )
    assert caplog.messages == [
        "step 4, validation: reward.own_tasks odd failed for 1 of 2 responses, so they are UNDECIDED: NameError: y (fns.py:3)"
    ]
