"""Calls that come at the same time, worked on together: one thread, one wake-up, one commit for all of them.

Called by services.py for CreateJob, where a thread and a commit for each call would cost more than the work itself.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

LARGEST_BATCH = 64

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Batches(Generic[_Item, _Answer]):
    """A thread that does what is asked of it, as many at once as have come. Lives on one event loop."""

    def __init__(self, work: Callable[[Sequence[_Item]], Sequence[_Answer | Exception]], *, name: str) -> None:
        """`work` answers each item, with an exception where that one failed; what it raises failed for all."""
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._items: SimpleQueue[tuple[_Item, asyncio.Future[_Answer]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def do(self, item: _Item) -> _Answer:
        """Have it done; raises what failed."""
        done: asyncio.Future[_Answer] = self._loop.create_future()
        self._items.put((item, done))
        return await done

    def close(self) -> None:
        """End the thread once everything that came is done."""
        self._items.put(None)

    def _run(self) -> None:
        while (first := self._items.get()) is not None:
            batch = [first]
            while len(batch) < LARGEST_BATCH and (following := self._next()) is not None:
                batch.append(following)
            answers = self._answers([item for item, _ in batch])
            waiting = [done for _, done in batch]
            if self._loop.is_closed():  # nobody waits any more
                return
            self._loop.call_soon_threadsafe(_give, waiting, answers)

    def _next(self) -> "tuple[_Item, asyncio.Future[_Answer]] | None":
        try:
            following = self._items.get_nowait()
        except Empty:
            return None
        if following is None:
            self._items.put(None)  # for the outer loop
        return following

    def _answers(self, items: Sequence[_Item]) -> Sequence[_Answer | Exception]:
        try:
            return self._work(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [answer for item in items for answer in self._answers([item])]  # one may fail; not the others


def _give(waiting: Sequence["asyncio.Future[_Answer]"], answers: Sequence[_Answer | Exception]) -> None:
    for done, answer in zip(waiting, answers, strict=True):
        if done.done():  # its caller went away
            continue
        if isinstance(answer, Exception):
            done.set_exception(answer)
        else:
            done.set_result(answer)
