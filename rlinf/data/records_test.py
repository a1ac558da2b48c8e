"""A sample that went on is one sample: every token keeps what was recorded of it."""

from __future__ import annotations

import numpy as np
import pytest

from rlinf.data.records import Finish, Sample


def part(name: str, tokens: list[int], *versions: tuple[int, int], finish: Finish = Finish.ABORT) -> Sample:
    n = len(tokens)
    return Sample(name, np.array(tokens, np.int32), -np.array(tokens, np.float32), np.ones(n, np.uint8), versions, finish)


def test_a_continued_sample_keeps_tokens_logprobs_and_versions() -> None:
    whole = part("g/0", [1, 2], (3, 2)).continued_by(part("g/0", [4, 5, 6], (3, 1), (4, 2), finish=Finish.STOP))
    assert whole.token_ids.tolist() == [1, 2, 4, 5, 6] and whole.rollout_logprobs.tolist() == [-1, -2, -4, -5, -6]
    assert (whole.versions, whole.finish, len(whole.loss_mask)) == (((3, 3), (4, 2)), Finish.STOP, 5)
    assert whole.token_ids.dtype == np.int32 and whole.loss_mask.dtype == np.uint8
    nothing = part("g/0", [])
    assert nothing.continued_by(whole).versions == whole.versions and whole.continued_by(nothing).finish is Finish.ABORT
    with pytest.raises(ValueError, match="g/0 is not continued by g/1"):
        whole.continued_by(part("g/1", []))
