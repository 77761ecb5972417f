"""Answers of the API server about callers, kept for a while: asking it for each call would make it the bottleneck.

One question at a time for one key, whoever asks; an answer in use is asked for again before it runs out, so that an
outage of the API server leaves callers at least a minute. Lives on one event loop; used by auth.py.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hone.errors import HoneError, Unavailable

KEPT_S = 120.0
"""The longest that an answer is believed."""
AGAIN_S = 60.0
"""From then on it is asked for again, while it is still believed."""
NO_KEPT_S = 5.0
"""A refusal is forgotten soon: who was just given a right, or a new token, does not wait."""
MOST = 4096
"""So many answers are kept of each kind; refusals have room of their own, so that noise pushes nobody out."""
MOST_AT_ONCE = 256
"""So many questions may be under way."""

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class _Kept(Generic[_Answer]):
    answer: _Answer
    until: float
    again_at: float


class Answers(Generic[_Answer]):
    """What a question was answered, by its key. A false answer is a refusal."""

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        *,
        kept_s: float = KEPT_S,
        again_s: float = AGAIN_S,
        no_kept_s: float = NO_KEPT_S,
    ) -> None:
        self._threads = threads
        self._kept_s, self._again_s, self._no_kept_s = kept_s, again_s, no_kept_s
        self._yes: dict[Hashable, _Kept[_Answer]] = {}
        self._no: dict[Hashable, _Kept[_Answer]] = {}
        self._asking: dict[Hashable, asyncio.Task[_Answer]] = {}

    async def get(self, key: Hashable, ask: Callable[[], _Answer]) -> _Answer:
        """The answer; `ask` runs in a thread, when there is none yet. Raises what it raises."""
        kept = self._yes.get(key) or self._no.get(key)
        now = time.monotonic()
        if kept is None or now >= kept.until:
            return await asyncio.shield(self._ask(key, ask))
        if now >= kept.again_at and key not in self._asking:
            self._ask(key, ask).add_done_callback(_tell)
        return kept.answer

    def _ask(self, key: Hashable, ask: Callable[[], _Answer]) -> "asyncio.Task[_Answer]":
        task = self._asking.get(key)
        if task is None:
            if len(self._asking) >= MOST_AT_ONCE:
                raise Unavailable("Too many callers are being looked up at once.", fix="Try again.")
            task = self._asking[key] = asyncio.get_running_loop().create_task(self._answer(key, ask))
            task.add_done_callback(_take_note)  # whoever asked may have gone away
        return task

    async def _answer(self, key: Hashable, ask: Callable[[], _Answer]) -> _Answer:
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
            self._keep(key, answer)
            return answer
        finally:
            self._asking.pop(key, None)

    def _keep(self, key: Hashable, answer: _Answer) -> None:
        now = time.monotonic()
        for there in (self._yes, self._no):
            there.pop(key, None)
        room, kept_s, again_s = (
            (self._yes, self._kept_s, self._again_s) if answer else (self._no, self._no_kept_s, self._no_kept_s)
        )
        room[key] = _Kept(answer, until=now + kept_s, again_at=now + again_s)
        while len(room) > MOST:
            room.pop(next(iter(room)))


def _take_note(task: "asyncio.Task[Any]") -> BaseException | None:
    return None if task.cancelled() else task.exception()


def _tell(task: "asyncio.Task[Any]") -> None:
    """What failed in the background is tried again by the next call, while the answer before is still believed."""
    error = _take_note(task)
    if isinstance(error, HoneError):
        _log.warning("what is known of a caller cannot be renewed now: %s", error)
    elif error:
        _log.error("what is known of a caller cannot be renewed now", exc_info=error)
