"""The log of a trainer's pod: events as JSON lines, each rank's lines as `[rank 3] text`, and the trainer's own words.

Called by backend.py. A rank's log is what comes out of its lines, without the mark; that of a node's first rank has the
trainer's own words too, which say what happened before any rank ran. Offsets count the bytes that come out. Reading on
from an offset asks for what was written since then, as long as this process remembers the place; without that the log
is read from its beginning. The kubelet keeps the newest part of a long log only.
"""

import json
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from hone.backends.kubernetes.answers import NotValid
from hone.backends.kubernetes.client import Api, pods_path
from hone.backends.kubernetes.objects import PodView
from hone.backends.run_files import parse_event
from hone.errors import NotFound
from hone.job import LOST_AFTER, Event, EventType
from hone.manifests.names import CONTAINER

CHUNK_BYTES = 256 * 1024
TAIL_BYTES = 1 << 20
"""What is kept of each rank with the job."""
MAX_PLACES = 2_000
_RANK = re.compile(rb"\[rank (\d+)\] ?")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a reader stopped: at a line's time, after so many lines of exactly that time."""

    stamp: bytes
    num_lines: int


@dataclass(frozen=True, slots=True)
class _Line:
    stamp: bytes
    text: bytes


class PodLogs:
    """Reads the logs of pods. Safe to use from several threads."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._lock = threading.Lock()
        self._places: OrderedDict[tuple[str, int, int], _Place] = OrderedDict()

    def read(
        self, pod: PodView, *, rank: int, first_rank: int, tail: int | None = None, offset: int = 0
    ) -> Iterator[bytes]:
        """What a rank wrote, in chunks of whole lines: from a byte on, or the last `tail` lines of that."""
        if tail is not None:
            last = deque(self._from(pod, rank, first_rank, offset), maxlen=max(tail, 0))
            if last:
                yield b"".join(line for line, _ in last)
            return
        chunk, size = bytearray(), offset
        place: _Place | None = None
        for line, place in self._from(pod, rank, first_rank, offset):
            chunk += line
            if len(chunk) >= CHUNK_BYTES:
                size += len(chunk)
                self._remember((pod.uid, rank, size), place)
                yield bytes(chunk)
                chunk.clear()
        if chunk:
            self._remember((pod.uid, rank, size + len(chunk)), place)
            yield bytes(chunk)

    def tails(self, pod: PodView, *, first_rank: int, num_ranks: int) -> dict[int, bytes]:
        """The last TAIL_BYTES of each rank, in one reading."""
        tails = {first_rank + number: _Tail() for number in range(num_ranks)}
        for line in self._lines(pod, None):
            rank, text = _split(line.text, first_rank)
            if rank in tails:
                tails[rank].add(text)
        return {rank: data for rank, tail in tails.items() if (data := tail.take())}

    def events(self, pod: PodView, *, after_seq: int) -> tuple[Event, ...]:
        """The events after that one, in order; where some are missing, a warning in their place says so. Where the log
        is gone, what the pod's status tells is left."""
        found: dict[int, Event] = {}
        for line in () if pod.is_gone else self._lines(pod, None):
            if (data := _event_of(line.text)) and (seq := data["seq"]) > after_seq:
                found.setdefault(seq, parse_event(line.text, seq))
        if (told := _last_words(pod)) and told.seq > after_seq:
            found.setdefault(told.seq, told)
        return tuple(_with_gaps_told(sorted(found.values(), key=lambda event: event.seq), after_seq))

    def _from(self, pod: PodView, rank: int, first_rank: int, offset: int) -> Iterator[tuple[bytes, _Place]]:
        """A rank's lines from a byte on, each with the place after it."""
        with self._lock:
            place = self._places.get((pod.uid, rank, offset))
        position = offset if place else 0
        for line, here in self._lines_after(pod, place) if place else _placed(self._lines(pod, None)):
            whose, text = _split(line.text, first_rank)
            if whose != rank:
                continue
            rest = text[max(0, offset - position) :]
            position += len(text)
            if rest:
                yield rest, here

    def _lines_after(self, pod: PodView, place: _Place) -> Iterator[tuple[_Line, _Place]]:
        """What follows that line in the log; times alone would not do, as they may repeat and go back."""
        is_found = False
        for line, here in _placed(self._lines(pod, place)):
            if is_found:
                yield line, here
            is_found = is_found or here == place
        if not is_found:  # the log was cut off behind it
            yield from ((line, here) for line, here in _placed(self._lines(pod, place)) if line.stamp > place.stamp)

    def _lines(self, pod: PodView, place: _Place | None) -> Iterator[_Line]:
        """Whole lines with their times. Nothing before the container is there, and after the pod is gone."""
        query = {"container": CONTAINER, "timestamps": "true"}
        if place:
            query["sinceTime"] = place.stamp.decode("ascii")[:19] + "Z"  # whole seconds are all that it knows
        try:
            with self._api.stream(pods_path(pod.namespace, pod.name, "log"), query) as stream:
                for raw in stream.lines(with_rest=pod.has_ended):
                    stamp, space, text = raw.partition(b" ")
                    if space and stamp[:1].isdigit():  # not a sentence of the kubelet's own
                        yield _Line(_sortable(stamp), text + b"\n")
        except (NotFound, NotValid):  # 400: the container is waiting to start
            return

    def _remember(self, key: tuple[str, int, int], place: _Place | None) -> None:
        if place is None:
            return
        with self._lock:
            self._places[key] = place
            self._places.move_to_end(key)
            while len(self._places) > MAX_PLACES:
                self._places.popitem(last=False)


class _Tail:
    """The last bytes of a log, in whole lines."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._size = 0

    def add(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)
        while self._size > TAIL_BYTES and len(self._lines) > 1:
            self._size -= len(self._lines.popleft())

    def take(self) -> bytes:
        return b"".join(self._lines)[-TAIL_BYTES:]


def _placed(lines: Iterator[_Line]) -> Iterator[tuple[_Line, _Place]]:
    """Each line with its place."""
    stamp, num_lines = b"", 0
    for line in lines:
        num_lines = num_lines + 1 if line.stamp == stamp else 1
        stamp = line.stamp
        yield line, _Place(stamp, num_lines)


def _split(text: bytes, first_rank: int) -> tuple[int | None, bytes]:
    """Whose line it is, and what it says; None for an event."""
    if match := _RANK.match(text):
        return int(match[1]), text[match.end() :]
    if _event_of(text):
        return None, b""
    return first_rank, text


def _last_words(pod: PodView) -> Event | None:
    """The checkpoint that the trainer's termination message tells of."""
    try:
        line = json.dumps(json.loads(pod.trainer.ended_message if pod.trainer else "")["checkpoint"]).encode()
    except (ValueError, KeyError, TypeError):
        return None
    data = _event_of(line)
    return parse_event(line, data["seq"]) if data else None


def _event_of(text: bytes) -> dict[str, int] | None:
    """The event that a line holds, with its number."""
    if not text.startswith(b"{") or b'"seq"' not in text:
        return None
    try:
        data = json.loads(text)
    except ValueError:
        return None
    is_one = isinstance(data, dict) and isinstance(data.get("seq"), int) and "type" in data and "time" in data
    return data if is_one else None


def _with_gaps_told(events: list[Event], after_seq: int) -> Iterator[Event]:
    last = after_seq
    for event in events:
        if event.seq > last + 1:
            lost = f"Events {last + 1} to {event.seq - 1} of the attempt are" if event.seq > last + 2 else (
                f"Event {last + 1} of the attempt is"
            )  # fmt: skip
            message = f"{lost} lost: they were not received, and the pod's log begins later."
            fields = {LOST_AFTER: str(last)}
            yield Event(seq=event.seq - 1, time=event.time, type=EventType.WARNING, message=message, fields=fields)
        yield event
        last = event.seq


def _sortable(stamp: bytes) -> bytes:
    """2026-11-24T12:00:00.5Z as a time in UTC with nine digits: the kubelet leaves out zeros at the end."""
    head, dot, rest = stamp.partition(b".")
    if not stamp.endswith(b"Z"):
        moment = datetime.fromisoformat(stamp.decode("ascii", "replace")).astimezone(UTC)
        head = moment.strftime("%Y-%m-%dT%H:%M:%S").encode()
        rest = rest[: max(rest.find(b"+"), rest.find(b"-"))]
    digits = rest.rstrip(b"Z") if dot else b""
    return head.rstrip(b"Z") + b"." + digits.ljust(9, b"0")
