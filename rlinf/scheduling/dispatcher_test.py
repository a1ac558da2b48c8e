"""Groups go to the engine with most room, and never beyond what an engine takes."""

import asyncio
import random

from rlinf.scheduling.dispatcher import Dispatcher


def test_the_emptiest_engine_is_taken_and_capacity_is_kept() -> None:
    async def run() -> None:
        dispatcher = Dispatcher(engines=3, running_requests=8, group_size=4)
        rng, most = random.Random(0), [0, 0, 0]
        taken: list[int] = []

        async def group(samples: int) -> None:
            async with dispatcher.seat(samples) as rank:
                taken.append(rank)
                most[rank] = max(most[rank], dispatcher.load[rank])
                await asyncio.sleep(rng.random() / 1000)

        await asyncio.gather(*(group(4) for _ in range(60)))
        assert dispatcher.load == [0, 0, 0] and most == [12, 12, 12] and len(taken) == 60 and taken[:9] == [0, 1, 2] * 3

    asyncio.run(run())


def test_a_group_larger_than_an_engine_runs_when_one_is_empty() -> None:
    async def run() -> None:
        dispatcher = Dispatcher(engines=1, running_requests=2, group_size=2)
        async with dispatcher.seat(100) as rank:
            assert rank == 0

    asyncio.run(run())


def test_the_longest_expected_goes_first_and_who_gave_up_is_passed_over() -> None:
    async def run() -> None:
        dispatcher, order = Dispatcher(engines=1, running_requests=1, group_size=1), []

        async def group(name: str, expected: float) -> None:
            async with dispatcher.seat(2, expected):
                order.append(name)
                await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(group(n, e)) for n, e in (("first", 0), ("short", 1), ("long", 9), ("gone", 8), ("later", 1))]
        await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["first", "long", "short", "later"] and dispatcher.load == [0]

    asyncio.run(run())


def test_a_closed_engine_is_left_alone_until_it_opens() -> None:
    async def run() -> None:
        dispatcher, taken = Dispatcher(engines=2, running_requests=1, group_size=1), []
        dispatcher.close(0)

        async def group() -> None:
            async with dispatcher.seat(2) as rank:
                taken.append(rank)
                await asyncio.sleep(0)

        await asyncio.gather(group(), group())
        dispatcher.close(1)
        waiting = asyncio.ensure_future(group())
        await asyncio.sleep(0.01)
        assert taken == [1, 1]
        dispatcher.open(0)
        await waiting
        assert taken == [1, 1, 0]

    asyncio.run(run())


def test_an_engine_is_freed_when_its_group_fails() -> None:
    async def run() -> None:
        dispatcher = Dispatcher(engines=1, running_requests=2, group_size=2)
        try:
            async with dispatcher.seat(2):
                raise RuntimeError("engine")
        except RuntimeError:
            pass
        assert dispatcher.load == [0]

    asyncio.run(run())


def test_many_groups_on_many_engines_go_where_a_plain_search_would_send_them() -> None:
    async def run() -> None:
        dispatcher, rng, running = Dispatcher(engines=7, running_requests=6, group_size=3), random.Random(1), []

        async def hold(samples: int, done: asyncio.Event, taken: asyncio.Future[int]) -> None:
            async with dispatcher.seat(samples) as rank:
                taken.set_result(rank)
                await done.wait()

        for turn in range(400):
            if len(running) < 18 and rng.random() < 0.6:
                load, done, taken = [*dispatcher.load], asyncio.Event(), asyncio.get_running_loop().create_future()
                running.append((asyncio.ensure_future(hold(1 + turn % 3, done, taken)), done))
                assert await taken == load.index(min(load))
            elif running:
                task, done = running.pop(rng.randrange(len(running)))
                done.set()
                await task
        assert len(dispatcher._rooms) <= 4 * 7 + 1

    asyncio.run(run())
