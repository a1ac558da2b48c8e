"""What a run's folder says of the groups that a step trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlinf.errors import UserError
from rlinf.runners.recorded import RecordedSteps

GOOD = '{"groups": ["2.b"], "generated": ["2.a", "2.b"]}\n'


def recorded(tmp_path: Path, content: bytes) -> RecordedSteps:
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "order_000002.jsonl").write_bytes(content)
    (samples / "order_second.jsonl").write_text("a copy of somebody's")
    return RecordedSteps(tmp_path)


def test_the_last_whole_line_counts(tmp_path: Path) -> None:
    steps = recorded(tmp_path, (GOOD.replace("2.b", "2.a") + GOOD + '{"groups": ["2').encode())
    assert steps.steps == [2] and steps.order(2) == (["2.b"], ["2.a", "2.b"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "does not say which groups"),
        (b'{"groups": ["2', "does not say which groups"),
        (b"\0\xff\n", "line 1: not UTF-8"),
        (b"{]\n", "line 1: not JSON"),
        (b"[1]\n", "line 1: not a JSON object"),
        (b'{"groups": ["2.a"]}\n', "line 1: no field `generated`"),
        (b'{"groups": 3, "generated": []}\n', "line 1: `groups` is 3, not a list of strings"),
        (b'{"groups": ["2.a"], "generated": ["2.b"]}\n', "does not say which groups"),
        (b'{"groups": ["a"], "generated": ["a"]}\n', "does not say which groups"),
    ],
)
def test_a_damaged_order_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=f"order_000002.jsonl.*{said}.* damaged"):
        recorded(tmp_path, content).order(2)
