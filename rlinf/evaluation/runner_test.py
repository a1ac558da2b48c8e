"""The line that a person watches."""

import io

from rlinf.data.records import Finish, GroupHeader, Status, Verdict
from rlinf.evaluation.runner import Progress


def group(status: Status, finish: Finish, extracted: str | None) -> GroupHeader:
    verdict = Verdict(0.0, status, extracted, "string", 0.0)
    return GroupHeader("g", "p", "math", 5, ("g/0", "g/1"), (30, 10), (30, 10), (finish,) * 2, (((0, 30),), ((0, 10),)), (verdict, verdict))


def test_a_line_at_most_every_ten_seconds_and_one_at_the_end() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress("base", samples=10, done=4, stream=stream, clock=lambda: now[0])
    now[0] = 100.0
    progress.begin()  # the engines are up
    now[0] = 104.0
    progress.finished(group(Status.RIGHT, Finish.STOP, "7"))
    assert stream.getvalue() == ""
    now[0] = 110.0
    progress.finished(group(Status.WRONG, Finish.LENGTH, None))
    assert stream.getvalue() == "base  samples 8/10  right 0.500  cut 0.500  no box 0.500  tokens/s 8  ETA 0:05\n"
    now[0] = 111.0
    progress.finished(group(Status.RIGHT, Finish.STOP, "7"))
    assert stream.getvalue().splitlines()[1].startswith("base  samples 10/10  right 0.667")
