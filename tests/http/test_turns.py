"""Turns: in order, a few each time round the loop, none for those who have gone."""

from __future__ import annotations

import asyncio

from sdengine.serve.turns import Turns


async def crowd(turns: Turns, count: int) -> tuple[list[int], list[int], list[asyncio.Task[None]]]:
    """(who has had a turn, how many of them at each round of the loop, their tasks)"""
    served: list[int] = []
    rounds: list[int] = []

    async def come(number: int) -> None:
        await turns.take()
        served.append(number)

    tasks = [asyncio.create_task(come(k)) for k in range(count)]
    return served, rounds, tasks


def test_others_are_heard_between_a_few_turns() -> None:
    async def main() -> None:
        served, rounds, tasks = await crowd(Turns(3), 20)
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            rounds.append(len(served))
        assert served == list(range(20)), "in order of arrival"
        steps = [b - a for a, b in zip([0, *rounds], rounds, strict=False)]
        assert max(steps) == 3
        assert len(rounds) >= 20 // 3

    asyncio.run(main())


def test_nobody_waits_for_a_turn_that_nobody_else_wants() -> None:
    async def main() -> None:
        turns = Turns(2)
        for _ in range(50):
            waits = turns.take()
            try:
                waits.send(None)
            except StopIteration:
                pass
            else:
                raise AssertionError("it waited")
            await asyncio.sleep(0)

    asyncio.run(main())


def test_who_has_gone_takes_no_turn() -> None:
    async def main() -> None:
        served, _, tasks = await crowd(Turns(1), 4)
        await asyncio.sleep(0)
        tasks[1].cancel()
        tasks[2].cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert served == [0, 3]
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
