from __future__ import annotations

from collections import Counter

import numpy as np

from rlinf.data.records import Prompt
from rlinf.runners.requests import name_groups


def test_a_prompt_that_a_step_meets_twice_has_two_names() -> None:
    a, b = (Prompt(name, np.array([1], np.int32), "math", ("7",)) for name in "ab")
    taken: Counter[str] = Counter()
    assert name_groups(4, [a, b, a], taken) + name_groups(4, [a], taken) == ["4.a", "4.b", "4.a@again:1", "4.a@again:2"]
