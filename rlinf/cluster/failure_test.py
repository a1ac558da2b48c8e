"""The first failure reaches everybody who waits, from any thread, and nobody else."""

from __future__ import annotations

import asyncio
import threading

import pytest

from rlinf.cluster.failure import Failure
from rlinf.errors import RunFailed


async def answers(count: int) -> list[asyncio.Future[int]]:
    return [asyncio.get_running_loop().create_future() for _ in range(count)]


def test_an_answer_ends_its_own_wait_alone() -> None:
    async def main() -> None:
        failure, (early, late) = Failure(), await answers(2)
        waits = [asyncio.ensure_future(failure.first(answer)) for answer in (early, late)]
        early.set_result(1)
        await waits[0]
        await asyncio.sleep(0)
        assert not waits[1].done() and not late.cancelled()
        late.set_exception(ValueError("an error is an answer, too"))
        await waits[1]
        assert isinstance(late.exception(), ValueError)
        await failure.first(early)  # what is there already is not waited for

    asyncio.run(main())


def test_a_report_from_another_thread_ends_all_waits() -> None:
    async def main() -> None:
        failure, many = Failure(), await answers(100)
        waits = [asyncio.ensure_future(failure.first(answer)) for answer in many]
        await asyncio.sleep(0)
        thread = threading.Thread(target=failure.report, args=(RunFailed("rank 3 died"),))
        thread.start()
        await asyncio.wait_for(asyncio.gather(*waits), 10)
        thread.join()
        assert not any(answer.done() for answer in many)
        await asyncio.wait_for(failure.first(many[0]), 10)  # nor does who comes later wait
        with pytest.raises(RunFailed, match="rank 3 died"):
            failure.check()

    asyncio.run(main())


def test_a_wait_may_be_given_up_and_another_loop_may_begin() -> None:
    failure = Failure()

    async def give_up() -> None:
        (answer,) = await answers(1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(failure.first(answer), 0.01)
        answer.set_result(1)  # with nobody there
        await asyncio.sleep(0)

    async def wait() -> None:
        (answer,) = await answers(1)
        waiting = asyncio.ensure_future(failure.first(answer))
        await asyncio.sleep(0)
        failure.report(RunFailed("gone"))
        await asyncio.wait_for(waiting, 10)

    asyncio.run(give_up())
    asyncio.run(wait())
