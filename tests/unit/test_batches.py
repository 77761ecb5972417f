"""Calls that come together are worked on together, and each gets its own answer."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from hone.remembered import MOST, Remembered
from hone.rpc.batches import LARGEST_BATCH, Batches


def test_what_comes_while_one_is_worked_on_is_done_together() -> None:
    sizes: list[int] = []
    first_is_there, go_on = threading.Event(), threading.Event()

    def work(items: Sequence[int]) -> Sequence[int | Exception]:
        sizes.append(len(items))
        first_is_there.set()
        go_on.wait(10)
        return [2 * item for item in items]

    async def run() -> list[int]:
        batches = Batches(work, name="test")
        calls = [asyncio.create_task(batches.do(0))]
        await asyncio.to_thread(first_is_there.wait, 10)
        calls += [asyncio.create_task(batches.do(number)) for number in range(1, LARGEST_BATCH + 11)]
        await asyncio.sleep(0.05)
        go_on.set()
        answers = await asyncio.gather(*calls)
        batches.close()
        return answers

    assert asyncio.run(run()) == [2 * number for number in range(LARGEST_BATCH + 11)]
    assert sizes == [1, LARGEST_BATCH, 10]


def test_one_that_fails_fails_alone_even_where_the_work_gives_up() -> None:
    def work(items: Sequence[int]) -> Sequence[int | Exception]:
        if 3 in items:
            raise ValueError("three")
        return [KeyError(item) if item == 4 else item for item in items]

    async def run() -> list[object]:
        batches = Batches(work, name="test")
        answers = await asyncio.gather(*(batches.do(number) for number in range(6)), return_exceptions=True)
        batches.close()
        return list(answers)

    zero, one, two, three, four, five = asyncio.run(run())
    assert [zero, one, two, five] == [0, 1, 2, 5]
    assert isinstance(three, ValueError) and isinstance(four, KeyError)


def test_a_caller_that_goes_away_keeps_nobody_from_an_answer() -> None:
    async def run() -> int:
        batches = Batches[int, int](lambda items: list(items), name="test")
        gone = asyncio.create_task(batches.do(1))
        await asyncio.sleep(0)
        gone.cancel()
        answer = await batches.do(2)
        with pytest.raises(asyncio.CancelledError):
            await gone
        batches.close()
        return answer

    assert asyncio.run(run()) == 2


def test_what_was_made_is_kept_for_the_very_object_and_equal_others() -> None:
    made: list[tuple[list[int], int]] = []

    def make(thing: list[int], other: int) -> int:
        made.append((thing, other))
        return sum(thing) + other

    remembered = Remembered[list[int], int](make)
    one, equal = [1, 2], [1, 2]
    assert [remembered(one, 1), remembered(one, 1), remembered(one, 2), remembered(equal, 2)] == [4, 4, 5, 5]
    assert len(made) == 3


def test_no_more_is_kept_than_is_said() -> None:
    remembered = Remembered[list[int], int](len)
    things = [[number] for number in range(MOST + 5)]
    for thing in things:
        remembered(thing)
    assert len(remembered._kept) == MOST
