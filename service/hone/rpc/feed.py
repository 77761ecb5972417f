"""Events for watchers: one reader of each namespace feeds all of them, however many there are.

The reader keeps the last events in a ring; a watcher that is further behind reads the database until it has caught up.
Cursors are exact: an answer's seq says that every event up to it was sent, so whoever resumes there misses none and
sees none twice, after a restart too. The more watchers there are, the more events go into one answer.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from hone.errors import HoneError, Unavailable
from hone.job import TERMINAL, Event, EventType
from hone.rpc.convert import event_to_message
from hone.v1 import job_pb2, training_service_pb2

RING_EVENTS = 4096
PAGE_EVENTS = 1000
HEARTBEAT_S = 20.0
"""An answer goes out at least so often: proxies cut streams that say nothing."""
LOOK_S = 5.0
"""The database is looked at so often even when nothing told of a change."""
LINGER_S = 0.05
LINGER_S_PER_WATCHER = 0.01

_log = logging.getLogger(__name__)

ReadEvents = Callable[[str, int], Awaitable[Sequence[Event]]]
"""(job id, or empty for all; after seq) → at most PAGE_EVENTS events, in order."""


class Feed:
    """Events of one namespace, as they come."""

    def __init__(self, read: ReadEvents, *, last_seq: int, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._read = read
        self._heartbeat_s = heartbeat_s
        self._ring: deque[tuple[Event, job_pb2.Event]] = deque()
        self._floor = last_seq
        self._last = last_seq
        self._woken = asyncio.Event()
        self._changed = asyncio.Event()
        self._answers: dict[tuple[str, int], tuple[bytes | None, bool]] = {}
        self._closed = False
        self.num_watchers = 0
        self._task = asyncio.get_running_loop().create_task(self._pump())

    def wake(self) -> None:
        """Something was committed."""
        self._woken.set()

    def close(self) -> None:
        """End every watch with Unavailable: it is resumed elsewhere, or later."""
        self._closed = True
        self._task.cancel()
        self._changed.set()

    async def watch(self, job: str, *, after_seq: int) -> AsyncIterator[bytes]:
        """Serialised answers to WatchJob or, with no job, WatchJobs; ends after the job's last event."""
        beat = _Beat(self._heartbeat_s)
        while True:
            async for answer, seq, ended in self._catch_up(job, after_seq):
                after_seq = seq
                if answer:
                    beat.start_again()
                    yield answer
                if ended:
                    return
            answer, ended = self._answer_after(job, after_seq)
            after_seq = max(after_seq, self._last)
            if answer:
                beat.start_again()
                yield answer
            if ended:
                return
            if after_seq >= self._last and not await self._change(beat.remaining_s):
                beat.start_again()
                yield _answer((), after_seq)

    async def _catch_up(self, job: str, after_seq: int) -> AsyncIterator[tuple[bytes | None, int, bool]]:
        """What the ring does not hold: history, and what a slow reader let run away."""
        while after_seq < self._floor:
            known = self._last  # everything up to here is in the database before it is read
            page = await self._read(job, after_seq)
            full = len(page) == PAGE_EVENTS
            after_seq = page[-1].seq if full else max(known, page[-1].seq if page else 0)
            messages = [event_to_message(event) for event in page]
            yield _answer(messages, after_seq) if page else None, after_seq, _has_ended(page, job)

    def _answer_after(self, job: str, after_seq: int) -> tuple[bytes | None, bool]:
        """What the ring holds after a cursor: made once for all watchers that stand there."""
        key = (job, after_seq)
        if key not in self._answers:
            found = [entry for entry in self._newest(after_seq) if not job or entry[0].job == job]
            answer = _answer([message for _, message in found], self._last) if found else None
            self._answers[key] = answer, _has_ended([event for event, _ in found], job)
        return self._answers[key]

    def _newest(self, after_seq: int) -> list[tuple[Event, job_pb2.Event]]:
        newest = []
        for entry in reversed(self._ring):
            if entry[0].seq <= after_seq:
                break
            newest.append(entry)
        return newest[::-1]

    async def _change(self, timeout_s: float) -> bool:
        """Wait for new events; False when the time is over first."""
        if self._closed:
            raise Unavailable("The service is shutting down.", fix="Watch again from the last seq.")
        changed = self._changed
        try:
            async with asyncio.timeout(max(timeout_s, 0)):
                await changed.wait()
        except TimeoutError:
            return False
        if self._closed:
            raise Unavailable("The service is shutting down.", fix="Watch again from the last seq.")
        return True

    async def _pump(self) -> None:
        while True:
            try:
                while page := await self._read("", self._last):
                    self._publish(page)
            except HoneError as error:
                _log.warning("events cannot be read, watchers wait: %s", error)
            await asyncio.sleep(max(LINGER_S, LINGER_S_PER_WATCHER * self.num_watchers))
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()

    def _publish(self, page: Sequence[Event]) -> None:
        self._ring.extend((event, event_to_message(event)) for event in page)
        self._last = page[-1].seq
        while len(self._ring) > RING_EVENTS:
            self._floor = self._ring.popleft()[0].seq
        self._answers.clear()
        self._changed.set()
        self._changed = asyncio.Event()


class Feeds:
    """The feeds of all namespaces that somebody watches. Lives on one event loop."""

    def __init__(self, open_feed: Callable[[str, int], Feed]) -> None:
        """`open_feed(namespace, last seq)` opens one; the number may be a moment old."""
        self._open = open_feed
        self._feeds: dict[str, Feed] = {}
        self._loop = asyncio.get_running_loop()

    def tell(self, namespace: str) -> None:
        """A transaction was committed; called from any thread."""
        # A feed that opens meanwhile reads what is there first, so it needs no telling.
        if namespace in self._feeds and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, namespace)

    @contextmanager
    def of(self, namespace: str, *, last_seq: int) -> Iterator[Feed]:
        """The feed of a namespace, kept while somebody uses it."""
        feed = self._feeds.get(namespace)
        if feed is None:
            feed = self._feeds[namespace] = self._open(namespace, last_seq)
        feed.num_watchers += 1
        try:
            yield feed
        finally:
            feed.num_watchers -= 1
            if not feed.num_watchers:
                feed.close()
                self._feeds.pop(namespace, None)

    def close(self) -> None:
        """End every watch."""
        for feed in self._feeds.values():
            feed.close()

    def _wake(self, namespace: str) -> None:
        if feed := self._feeds.get(namespace):
            feed.wake()


class _Beat:
    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.start_again()

    def start_again(self) -> None:
        self._due = asyncio.get_running_loop().time() + self._interval_s

    @property
    def remaining_s(self) -> float:
        return self._due - asyncio.get_running_loop().time()


def _answer(events: Sequence[job_pb2.Event], seq: int) -> bytes:
    # WatchJobsResponse has the same two fields, so both streams share the bytes; a test holds the two together.
    data: bytes = training_service_pb2.WatchJobResponse(events=events, seq=seq).SerializeToString()
    return data


def _has_ended(events: Sequence[Event], job: str) -> bool:
    return bool(job) and any(
        (event.type == EventType.STATE and event.fields.get("state") in TERMINAL) or "deleted" in event.fields
        for event in events
    )
